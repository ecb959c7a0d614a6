"""From nested dicts to frozen dataclasses, with every complaint in one sentence.

A section with a `name` (model, source, sampler, ...) becomes an instance of the class which that
name has in its table; its other keys are the fields of that class.

Every value is held to bounds of its type, whatever else its field asks for: what is larger, longer
or no number could only fail later, after minutes or in a stack trace.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

import numpy as np

from ig_jax import pytree
from ig_jax.bounds import CHARACTERS, ENTRIES, LARGE, NESTED, SMALL, WHOLE
from ig_jax.errors import UserError, shown
from ig_jax.io import paths


class ConfigError(UserError, ValueError):
    """A user's mistake in a config."""


def named(table: Mapping[str, Any], default: Any = dataclasses.MISSING) -> Any:
    """A field whose section picks a class of `table` by its `name`."""
    return field(default=default, metadata={"table": table})


def optionally_named(table: Mapping[str, Any]) -> Any:
    """The same, None where a config lacks the section, or says None; records lack it then."""
    return field(default=None, metadata={"table": table, "unset": None})


def each_named(table: Mapping[str, Any]) -> Any:
    """A field whose section maps names of `table` to the settings of each."""
    return field(metadata={"each": table})


def each(cls: type) -> Any:
    """A field whose section maps any names to sections of the dataclass `cls`."""
    return field(metadata={"entries": cls})


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {shown(value)}: {rule}")


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean x?' for the known name closest to `name`, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def plain(value: Any, path: str = "", depth: int = 0) -> Any:
    """A section, or what it holds, with NumPy's numbers as Python's, as JSON can hold them.

    Raises:
      ConfigError: sections or tuples in too many others, or the key of one is no name.
    """
    if depth > NESTED:
        raise ConfigError(f"{path[:100]}: lies in more than {NESTED} sections or tuples")
    if isinstance(value, Mapping):
        for name in value:
            if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= 100):
                raise ConfigError(f"{path or 'the config'}: {shown(name)} is no name of a field")
        dot = f"{path}." if path else ""
        return {name: plain(inner, dot + name, depth + 1) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(inner, path, depth + 1) for inner in value)
    return value.item() if isinstance(value, np.generic) else value


def _typed(value: Any, kind: Any, path: str, most: int | None = None) -> Any:
    """`value` as a field of type `kind` holds it; `most`: see `at_most`."""
    if kind is paths.Location:
        text = _typed(value, str, path, most)
        return text and paths.given(text, path)
    if typing.get_origin(kind) is tuple:
        rule = "must be a tuple, such as (1,) or (1, 2)"
        require(isinstance(value, list | tuple), path, value, rule)
        require(len(value) <= ENTRIES, path, value, f"must not have more than {ENTRIES} entries")
        return tuple(_typed(item, typing.get_args(kind)[0], path, most) for item in value)
    accepted = int | float if kind is float else kind
    # A truth value is an int to Python.
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    require(fits, path, value, f"must be of type {kind.__name__}")
    if kind is int:
        bound = WHOLE if most is None else most
        require(value <= bound, path, value, f"must be at most {bound}")
        require(value >= -bound, path, value, f"must be at least {-bound}")
    if kind is float:
        require(abs(value) <= LARGE, path, value, f"must be finite, and at most {LARGE:g} in size")
        near = f"is nearly 0: must be 0 itself, or at least {SMALL:g} in size"
        require(value == 0 or abs(value) >= SMALL, path, value, near)
        return float(value)
    if kind is str:
        bound = CHARACTERS if most is None else most
        require(len(value) <= bound, path, value, f"must not have more than {bound} characters")
        rule = "must be text without control characters"
        require(not any(unicodedata.category(c) in ("Cc", "Cs") for c in value), path, value, rule)
    return value


def pick(table: Mapping[str, Any], name: Any, path: str) -> Any:
    if not (isinstance(name, str) and name in table):
        known = nearest(name[:100] if isinstance(name, str) else "", table)
        raise ConfigError(f"{path} = {shown(name)}: no such name; {known}")
    return table[name]


def _section(values: Any, path: str) -> dict[str, Any]:
    require(isinstance(values, Mapping), path, values, "must be a section (a ConfigDict or dict)")
    return dict(values)


def _lists(value: Any, path: str) -> dict[str, tuple[float, ...]]:
    """A section of sections of tuples of numbers, by dotted name."""
    return {
        name: _typed(listed, tuple[float, ...], f"{path}.{name}")
        for name, listed in pytree.flatten(_section(value, path)).items()
    }


def _is_unset(value: Any, recorded: int | float | str | None) -> bool:
    return value is None or (type(value) in (int, float, str) and value == recorded)


def recorded(parsed: Any, values: Any) -> Any:
    """A section as records of runs hold it: 0 or '' where a field is None for not set, and without
    sections that are None.

    Args:
      parsed: what `make` has made of it.
      values: the section, or what it holds.
    """
    if not isinstance(values, Mapping):
        return values
    if isinstance(parsed, Mapping):
        return {name: recorded(parsed.get(name), value) for name, value in values.items()}
    if not dataclasses.is_dataclass(parsed):
        return values
    unset = {s.name: s.metadata.get("unset") for s in dataclasses.fields(parsed)}
    said = {
        name: unset.get(name) if value is None else recorded(getattr(parsed, name, None), value)
        for name, value in values.items()
    }
    return {name: value for name, value in said.items() if value is not None}


def _field(spec: dataclasses.Field, kind: Any, value: Any, path: str) -> Any:
    if "unset" in spec.metadata:
        if _is_unset(value, spec.metadata["unset"]):
            return None
        [kind] = set(typing.get_args(kind)) - {types.NoneType}
    if kind == Mapping[str, tuple[float, ...]]:
        return _lists(value, path)
    if kind == Mapping[str, Any]:  # whoever reads it has the rules
        return types.MappingProxyType(_section(value, path))
    if "entries" in spec.metadata:
        entries = _section(value, path)
        require(len(entries) <= ENTRIES, path, value, f"must not have more than {ENTRIES} entries")
        return types.MappingProxyType(
            {
                name: make(spec.metadata["entries"], entries[name], f"{path}.{name}")
                for name in entries
            }
        )
    if "table" in spec.metadata:
        section = _section(value, path)
        if "name" not in section:
            raise ConfigError(f"{path}.name is missing; known: {', '.join(spec.metadata['table'])}")
        kind = section.pop("name")
        return make(pick(spec.metadata["table"], kind, f"{path}.name"), section, path, kind)
    if "each" in spec.metadata:
        table = spec.metadata["each"]
        return types.MappingProxyType(
            {
                name: make(pick(table, name, f"{path}.{name}"), settings, f"{path}.{name}", name)
                for name, settings in _section(value, path).items()
            }
        )
    if dataclasses.is_dataclass(kind):
        return make(kind, value, path)
    return _typed(value, kind, path, spec.metadata.get("most"))


def is_required(spec: dataclasses.Field) -> bool:
    """Returns whether a section must give a field."""
    absent = dataclasses.MISSING
    return spec.init and spec.default is absent and spec.default_factory is absent


def fields_of(cls: type) -> dict[str, dataclasses.Field]:
    """Fields that a section for the dataclass `cls` may have, by name."""
    return {s.name: s for s in dataclasses.fields(cls) if s.init and s.name != "raw"}


def make(cls: type, values: Any, path: str, kind: str | None = None) -> Any:
    """An instance of the dataclass `cls` from a section; `path` is its dotted name.

    `kind`: the section's `name`, where that chose `cls`.
    """
    values = _section(values, path)
    dot = f"{path}." if path else ""
    specs = fields_of(cls)
    for name in values:
        if name not in specs:
            hint = nearest(name, specs)
            if kind and not hint.startswith("known"):
                hint += f" {kind!r} has {', '.join(specs)}"
            raise ConfigError(f"{dot}{name}: unknown field; {hint}")
    for name, spec in specs.items():
        if name not in values and is_required(spec):
            hint = f"{kind!r} needs it" if kind else "configs/base.py shows every field"
            raise ConfigError(f"{dot}{name}: missing; {hint}")
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
