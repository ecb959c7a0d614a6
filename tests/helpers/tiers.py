"""Which cases of a parametrized test run by default."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def slow_but(
    kept: Collection[Any], cases: Iterable[Any], name: Callable[[Any], str] | None = None
) -> list[Any]:
    """Cases for `pytest.mark.parametrize` of one argument: those that are not kept are slow.

    Args:
      kept: the cases that run by default, or their names where `name` is given.
      cases: all of them.
      name: of a case, also its id; None lets pytest name it.
    """
    cases = list(cases)
    known = [case if name is None else name(case) for case in cases]
    unknown = [case for case in kept if case not in known]
    assert not unknown, f"no such case: {unknown}"
    return [
        pytest.param(
            case,
            marks=() if key in kept else pytest.mark.slow,
            **({} if name is None else {"id": key}),
        )
        for case, key in zip(cases, known, strict=True)
    ]
