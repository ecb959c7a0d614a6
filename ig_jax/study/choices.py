"""From the section `select` to a study: a method for each combination of values."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from ig_jax import pytree
from ig_jax.checkpoint.compatibility import as_json
from ig_jax.config.studies import VARIED, LinearProbe, Method, Select, Study
from ig_jax.errors import UserError, shown

MOST = 1000  # combinations
_ABSENT = object()


def study_of(raw: Mapping[str, Any], select: Select) -> Study:
    """The candidates as methods; the baseline is the config's own setting, which is always one.

    Args:
      raw: the config, as nested dicts.
      select: its section.

    Raises:
      UserError: a field is unknown, its values are no tuple, or nothing is left to choose from.
    """
    fields = pytree.flatten(select.values)
    own = {path: _own(raw, path) for path in fields}
    for path, values in fields.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(
                f"select.values.{path} = {shown(values)}: must be a tuple of the values to try"
            )
    if not fields or math.prod(map(len, fields.values())) > MOST:
        raise UserError(
            f"select.values: needs 1 to {MOST} combinations of values, such as "
            "{'objective': {'terms': {'sra2': {'depth': (1, 2, 3)}}}}"
        )
    points = [own] + [
        dict(zip(fields, point, strict=True)) for point in itertools.product(*fields.values())
    ]
    names = _short_names(list(fields))
    methods: dict[str, Method] = {}
    for point in points:
        name = ",".join(f"{names[path]}={_text(value)}" for path, value in point.items())
        overrides = pytree.unflatten(point)
        if name in methods and as_json(methods[name].overrides) != as_json(overrides):
            raise UserError(f"select.values: two candidates would be called {name!r}; drop one")
        methods.setdefault(name, Method(overrides))
    if len(methods) == 1:
        raise UserError(f"select.values: hold nothing but the config's own setting ({name})")
    own_name = next(iter(methods))
    return Study(methods, select.seeds, own_name, (select.metric,), LinearProbe((), 0.1))


def _own(raw: Mapping[str, Any], path: str) -> Any:
    """The config's own value of a field."""
    value: Any = raw
    for name in path.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    if value is _ABSENT or path.split(".")[0] not in VARIED:
        raise UserError(
            f"select.values.{path}: is no field that runs may differ in; they may in those of "
            f"{', '.join(VARIED)} that this config has"
        )
    return value


def _short_names(paths: list[str]) -> dict[str, str]:
    """The last word of each path, or the whole path where two end alike."""
    last = [path.rpartition(".")[2] for path in paths]
    return {p: word if last.count(word) == 1 else p for p, word in zip(paths, last, strict=True)}


def _text(value: Any) -> str:
    """A value within the name of a folder."""
    if isinstance(value, list | tuple):
        return "-".join(map(_text, value)) or "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:60]
