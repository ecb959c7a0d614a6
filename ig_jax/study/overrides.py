"""One config as another one with changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(config: Mapping[str, Any], overrides: Mapping[str, Any], path: str = "") -> dict:
    """A nested config with some of its fields replaced; neither argument is changed.

    Sections are merged field by field. None removes a field. A section that is new, or whose `name`
    is another one's, is taken as it is given.

    Args:
      config: of sections and values.
      overrides: as deep as the changes lie.
      path: of `config`, for messages.

    Raises:
      ValueError: what is to be removed is not there.
    """
    result = dict(config)
    for name, value in overrides.items():
        old = config.get(name)
        if value is None:
            if name not in config:
                raise ValueError(f"{path}{name} = None: there is no such field to remove")
            del result[name]
        elif isinstance(value, Mapping) and isinstance(old, Mapping) and _same_name(old, value):
            result[name] = merged(old, value, f"{path}{name}.")
        else:
            result[name] = value
    return result


def _same_name(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" not in new or new["name"] == old.get("name")


def difference(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict:
    """The overrides that make `other` of `config`: merged(config, difference) == other."""
    found: dict[str, Any] = dict.fromkeys(name for name in config if name not in other)
    for name, value in other.items():
        old = config.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and _same_name(old, value):
            changed = difference(old, value)
            found |= {name: changed} if changed else {}
        elif name not in config or value != old:
            found[name] = value
    return found
