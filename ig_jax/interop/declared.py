"""Declarations about a state dict beyond its arrays: by flags, or by the metadata of our exports.

An export is a safetensors file with one more entry in its header, `ig_jax`: a JSON object with the
fields of `Declared`. It is read like anything from outside: every field is checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ig_jax.codecs import CODECS, to_uint8
from ig_jax.diffusion import PROCESSES
from ig_jax.diffusion.flow import PATHS, PREDICTIONS
from ig_jax.errors import UserError, shown
from ig_jax.io import files
from ig_jax.models import MODELS
from ig_jax.models.self_conditioning import SCALINGS

ENTRY, _VERSION = "ig_jax", 1  # of the header
# Begins the names of arrays by which a published class refuses, when it loads strictly, a network
# that it would compute otherwise.
ONLY = "ig_jax_only."
NOISE_TO_DATA, DATA_TO_NOISE = "noise_to_data", "data_to_noise"
DIRECTIONS = (NOISE_TO_DATA, DATA_TO_NOISE)
MOST = 2**31  # of any count


@dataclass(frozen=True)
class Declared:
    """None: not given."""

    # Flags of --mode=import, and metadata.
    family: str | None = None  # of `models.MODELS`
    num_heads: int | None = None
    # Where the intermediate head reads, from 1.
    readout_depth: int | None = None
    time_direction: str | None = None  # from t = 0 to t = 1
    num_classes: int | None = None  # without the null class
    path: str | None = None  # of `diffusion.flow`
    prediction: str | None = None
    # Metadata alone.
    process: str | None = None
    time_scale: float | None = None
    mlp_ratio: float | None = None
    label_drop: float | None = None  # 0: there is no null class to guide with
    codec: str | None = None
    rounding: str | None = None
    # The section of the config, its tap a number.
    self_conditioning: Mapping[str, Any] | None = None
    described: frozenset[str] = frozenset()  # the fields that are from metadata

    def __getitem__(self, field: str) -> Any:
        return getattr(self, field)

    def say(self, field: str) -> str:
        """A field and its value as the user knows it, for messages."""
        value = self[field]
        if field in self.described:
            return f"{field} = {value!r} in its metadata"
        return f"--{field}={value}"


UNDECLARED = Declared()
FIELDS = tuple(f.name for f in dataclasses.fields(Declared) if f.name != "described")
DECLARABLE = FIELDS[: FIELDS.index("process")]


def _one_of(known: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda v: isinstance(v, str) and v in known, f"must be one of {', '.join(known)}"


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < MOST and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < MOST


def _is_self_conditioning(value: Any) -> bool:
    kinds = {"tap": int, "normalise": bool, "scaling": str, "stop_gradient": bool}
    if not isinstance(value, dict) or {name: type(v) for name, v in value.items()} != kinds:
        return False
    return 1 <= value["tap"] < MOST and value["scaling"] in SCALINGS


_COUNT = (_is_count, "must be a whole number above 0")
POSITIVE = (lambda v: _is_number(v) and v > 0, "must be a number above 0")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "family": _one_of(MODELS),
    "num_heads": _COUNT,
    "readout_depth": _COUNT,
    "time_direction": _one_of(DIRECTIONS),
    "num_classes": _COUNT,
    "path": _one_of(PATHS),
    "prediction": _one_of(PREDICTIONS),
    "process": _one_of(PROCESSES),
    "time_scale": POSITIVE,
    "mlp_ratio": POSITIVE,
    "label_drop": (lambda v: _is_number(v) and 0 <= v < 1, "must be a number from 0, below 1"),
    "codec": _one_of(CODECS),
    "rounding": _one_of(to_uint8.ROUNDING_RULES),
    "self_conditioning": (
        _is_self_conditioning,
        "must be tap, normalise, scaling and stop_gradient of self-conditioning",
    ),
}


def of_flags(**flags: Any) -> Declared:
    """Reads flags; None, '' and 0 stand for those that are not set.

    Raises:
      UserError: a value is none of those that the flag takes.
    """
    declared = {field: value for field, value in flags.items() if value not in ("", 0, None)}
    for field, value in declared.items():
        holds, rule = _RULES[field]
        if not holds(value):
            raise UserError(f"--{field}={value}: {rule}")
    return Declared(**declared)


def of_metadata(metadata: Mapping[str, str]) -> Declared:
    """Reads the header of a safetensors file; declares nothing where it has no entry of ours.

    Raises:
      UserError: the entry is not one that this version writes.
    """
    if ENTRY not in metadata:
        return UNDECLARED
    place = f"its metadata {ENTRY!r}"
    content = files.parse_json(metadata[ENTRY], place)
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        version = content.get("version") if isinstance(content, dict) else content
        raise UserError(f"{place}: is of version {shown(version)}, not {_VERSION}; export it again")
    fields = {name: value for name, value in content.items() if name != "version"}
    for name, value in fields.items():
        if name not in _RULES:
            raise UserError(f"{place}: has an unknown field {shown(name)}; export it again")
        holds, rule = _RULES[name]
        if not holds(value):
            raise UserError(f"{place}: {name} = {shown(value)}: {rule}")
    return Declared(**fields, described=frozenset(fields))


def to_metadata(declared: Declared) -> dict[str, str]:
    """The header entries for `of_metadata`, and the one that Hugging Face's readers ask for."""
    fields = {field: declared[field] for field in FIELDS if declared[field] is not None}
    return {"format": "pt", ENTRY: json.dumps({"version": _VERSION, **fields})}


def together(flags: Declared, described: Declared) -> Declared:
    """Both as one.

    Raises:
      UserError: they contradict each other; names all that do.
    """
    different = [
        f"--{field}={flags[field]}, but the file's metadata says {described[field]!r}"
        for field in FIELDS
        if None not in (flags[field], described[field]) and flags[field] != described[field]
    ]
    if different:
        raise UserError(f"{'; '.join(different)}: leave the flag out")
    fields = {f: described[f] if flags[f] is None else flags[f] for f in FIELDS}
    return Declared(**fields, described=described.described)
