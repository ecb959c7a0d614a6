"""Errors that the user reads as one sentence, without a stack trace."""

from collections.abc import Iterable
from typing import Any

LONGEST_SHOWN = 200  # characters of a value in a message


class UserError(Exception):
    """A mistake in what a run was given: names the file, key or value, the rule and the fix."""


class BadExample(UserError):
    """One example of a data set that cannot be used, such as a corrupt image; names its file."""


def shown(value: Any) -> str:
    """`repr(value)` in one line, for a message, cut after `LONGEST` characters."""
    try:
        text = repr(value)
    except ValueError:  # an int, or in it one, of more digits than Python turns into text
        if isinstance(value, int):
            return f"a number of {value.bit_length():,} bits"
        return f"a {type(value).__name__} with a number of thousands of digits"
    except RecursionError:
        return f"a {type(value).__name__} of many in one another"
    text = " ".join(text.split()) if "\n" in text else text  # of an array
    return (
        text
        if len(text) <= LONGEST_SHOWN
        else f"{text[:LONGEST_SHOWN]}... ({len(text):,} characters)"
    )


def listed(values: Iterable[Any]) -> str:
    """ "'a', 'b'" for a message, cut after `LONGEST` characters; 'nothing' where there are none."""
    text = ", ".join(map(shown, values)) or "nothing"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def require_all(settings: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raises ValueError for the first of `rules` that does not hold.

    Args:
      settings: whose fields they are of.
      rules: (field, whether it holds, the rule in words).
    """
    for field, holds, rule in rules:
        if not holds:
            raise ValueError(f"{field} = {shown(getattr(settings, field))}: {rule}")
