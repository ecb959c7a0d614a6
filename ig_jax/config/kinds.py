"""Sections whose `name` chooses a kind: where they are, and the fields that each kind has."""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from ig_jax.config.parser import fields_of, is_required, pick
from ig_jax.config.run_config import Config
from ig_jax.errors import UserError

_PREFIX = "--config."


def _tables(key: str, cls: type = Config, path: str = "") -> dict[str, Mapping[str, type]]:
    """Dotted path of every field with a table of kinds in its metadata `key` -> that table."""
    found, hints = {}, typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        place = path + spec.name
        if key in spec.metadata:
            found[place] = spec.metadata[key]
        elif dataclasses.is_dataclass(hints[spec.name]):
            found |= _tables(key, hints[spec.name], f"{place}.")
    return found


def named_sections() -> dict[str, Mapping[str, type]]:
    """Dotted path of every section that has a `name` -> name -> dataclass of its other fields."""
    return _tables("table")


def _entries() -> dict[str, Mapping[str, type]]:
    """Dotted path of every section of sections that are called after their kind -> those kinds."""
    return _tables("each")


@dataclass(frozen=True)
class Choice:
    """A section whose kind the command line says, and what it says of the fields.

    Attributes:
      section: its dotted path.
      name: of the kind; None: that is the section's own name.
      kinds: name -> dataclass of its fields.
      values: field -> words.
    """

    section: str
    name: str | None
    kinds: Mapping[str, type]
    values: dict[str, str]

    def apply(self, config: ConfigDict) -> None:
        """Puts the kind into its section, with the fields that it shares with the old kind.

        Raises:
          UserError: there is no such kind, it has no such field, or one is missing.
        """
        *parents, last = self.section.split(".")
        name = last if self.name is None else self.name
        cls = pick(self.kinds, name, f"{self.section}.name")
        specs = fields_of(cls)
        for field in self.values:
            if field not in specs:
                raise UserError(
                    f"{self.section}.{field}: unknown field; {name!r} has {', '.join(specs)}"
                )
        given = {n: _value(cls, specs[n], text) for n, text in self.values.items()}
        for parent in parents:
            config = config[parent]
        with config.unlocked():
            self._begin(config, last, cls)
            with config[last].ignore_type():  # the parser knows the types better
                for field, value in given.items():
                    config[last][field] = value
        missing = [n for n, s in specs.items() if is_required(s) and n not in config[last]]
        if missing:
            raise UserError(
                f"{self.section}: {name!r} also needs {', '.join(missing)}; add "
                + " ".join(f"{_PREFIX}{self.section}.{field}=..." for field in missing)
            )

    def _begin(self, config: ConfigDict, last: str, cls: type) -> None:
        """Makes the section one of this kind, where it is none."""
        if self.name is None:
            if last not in config:
                config[last] = ConfigDict()
            return
        old = config.get(last) or {}
        if old.get("name") != self.name:
            shared = _shared(self.kinds.get(old.get("name")), cls)
            kept = {field: old[field] for field in old if field in shared}
            config[last] = ConfigDict({"name": self.name, **kept})


def chosen(words: Sequence[str]) -> tuple[list[Choice], list[str]]:
    """The kinds that a command line names, and the words that say nothing of them.

    ml_collections would hold a section to the fields that the config file has there.
    """
    named, entries = named_sections(), _entries()
    split = list(_overrides(words))
    choices: dict[str, Choice] = {}
    for path, value, _ in split:
        section, _, field = path.rpartition(".")
        above, _, entry = section.rpartition(".")
        if field == "name" and section in named:
            choices[section] = Choice(section, value, named[section], {})
        elif entry in entries.get(above, {}):
            choices[section] = Choice(section, None, entries[above], {})
    rest: list[str] = []
    for path, value, given in split:
        section, _, field = path.rpartition(".")
        if section not in choices:
            rest += given
        elif field != "name" or choices[section].name is None:
            choices[section].values[field] = value
    return list(choices.values()), rest


def _overrides(words: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(dotted path or '', value, the words that say so), of words as absl understands them."""
    i = 0
    while i < len(words):
        given = [words[i]]
        path, equals, value = words[i].removeprefix(_PREFIX).partition("=")
        if not words[i].startswith(_PREFIX):
            path = ""
        elif not equals:  # the next word is the value, or it is a flag that is on
            given = [*words[i : i + 1], *(w for w in words[i + 1 : i + 2] if w[:2] != "--")]
            value = given[1] if len(given) == 2 else "true"
        yield path, value, given
        i += len(given)


def _shared(old: type | None, new: type) -> set[str]:
    """Fields that two kinds have from a common base: those of equal name may mean other things."""
    bases = set() if old is None else {*old.__mro__} & {*new.__mro__}
    return {name for base in bases if dataclasses.is_dataclass(base) for name in fields_of(base)}


def _value(cls: type, spec: dataclasses.Field, text: str) -> Any:
    """What the words of a command line mean for a field; the parser refuses what does not fit."""
    kind = typing.get_type_hints(cls)[spec.name]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text in ("None", "none"):
            return None
        [kind] = set(typing.get_args(kind)) - {types.NoneType}
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if kind not in (int, float) and typing.get_origin(kind) is not tuple:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text
    is_tuple = typing.get_origin(kind) is tuple
    return (value,) if is_tuple and not isinstance(value, tuple | list) else value


def described() -> str:
    """Every section with kinds, and the fields of each with types and defaults, as Markdown."""
    lines = []
    sections = {f"{path}.<name>": kinds for path, kinds in _entries().items()}
    for section, kinds in (named_sections() | sections).items():
        lines += [f"## {section}", ""]
        for name, cls in kinds.items():
            about = (cls.__doc__ or "").strip().split("\n")[0]
            written = not about.startswith(f"{cls.__name__}(")  # by a person, not by dataclass
            lines.append(f"- `{name}`: {about}" if written else f"- `{name}`")
            hints = typing.get_type_hints(cls)
            for field, spec in fields_of(cls).items():
                default = "" if is_required(spec) else f" = {spec.default!r}"
                lines.append(f"  - `{field}: {_type_name(hints[field])}{default}`")
        lines.append("")
    return "\n".join(lines)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, typing.get_args(kind)))
    if kind is types.NoneType:
        return "None"
    if isinstance(kind, type) and typing.get_origin(kind) is None:
        return kind.__name__
    return re.sub(r"\b[a-z_]+\.", "", str(kind))
