"""From nested dicts to frozen dataclasses, with every complaint in one sentence.

A section with a `name` (model, source, sampler, ...) becomes an instance of the class which that
name has in its table; its other keys are the fields of that class.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from ig_jax import paths, tree
from ig_jax.errors import UserError


class ConfigError(UserError, ValueError):
    """A user's mistake in a config."""


def named(table: Mapping[str, Any], default: Any = dataclasses.MISSING) -> Any:
    """A field whose section picks a class of `table` by its `name`."""
    return field(default=default, metadata={"table": table})


def each_named(table: Mapping[str, Any]) -> Any:
    """A field whose section maps names of `table` to the settings of each."""
    return field(metadata={"each": table})


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r}: {rule}")


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean x?' for the known name closest to `name`, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _typed(value: Any, kind: Any, path: str) -> Any:
    """`value` as a field of type `kind` holds it."""
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} = {value!r}: must be a tuple, such as (1,) or (1, 2)")
        return tuple(_typed(item, typing.get_args(kind)[0], path) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is paths.Location:
        text = _typed(value, str, path)
        return paths.given(text, path) if text else ""
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise ConfigError(f"{path} = {value!r}: must be of type {kind.__name__}")


def _pick(table: Mapping[str, Any], name: Any, path: str) -> Any:
    if name not in table:
        raise ConfigError(f"{path} = {name!r}: no such name; {nearest(str(name), table)}")
    return table[name]


def _section(values: Any, path: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} = {values!r}: must be a section (a ConfigDict or dict)")
    return dict(values)


def _lists(value: Any, path: str) -> dict[str, tuple[float, ...]]:
    """A section of sections of tuples of numbers, by dotted name."""
    return {
        name: _typed(listed, tuple[float, ...], f"{path}.{name}")
        for name, listed in tree.flatten(_section(value, path)).items()
    }


def _field(spec: dataclasses.Field, kind: Any, value: Any, path: str) -> Any:
    if kind == Mapping[str, tuple[float, ...]]:
        return _lists(value, path)
    if "table" in spec.metadata:
        section = _section(value, path)
        if "name" not in section:
            raise ConfigError(f"{path}.name is missing; known: {', '.join(spec.metadata['table'])}")
        cls = _pick(spec.metadata["table"], section.pop("name"), f"{path}.name")
        return make(cls, section, path)
    if "each" in spec.metadata:
        table = spec.metadata["each"]
        return types.MappingProxyType(
            {
                name: make(_pick(table, name, f"{path}.{name}"), settings, f"{path}.{name}")
                for name, settings in _section(value, path).items()
            }
        )
    return make(kind, value, path) if dataclasses.is_dataclass(kind) else _typed(value, kind, path)


def make(cls: type, values: Any, path: str) -> Any:
    """An instance of the dataclass `cls` from a section; `path` is its dotted name."""
    values = _section(values, path)
    dot = f"{path}." if path else ""
    specs = {s.name: s for s in dataclasses.fields(cls) if s.name != "raw"}
    for name in values:
        if name not in specs:
            raise ConfigError(f"{dot}{name}: unknown field; {nearest(name, specs)}")
    for name, spec in specs.items():
        if name not in values and spec.default is dataclasses.MISSING and spec.init:
            raise ConfigError(f"{dot}{name}: missing; configs/base.py shows every field")
    hints = typing.get_type_hints(cls, include_extras=True)
    arguments = {
        name: _field(spec, hints[name], values[name], dot + name)
        for name, spec in specs.items()
        if name in values
    }
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{dot}{error}") from error
