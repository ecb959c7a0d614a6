"""Provenance of a data set of latents, kept beside them: `ig_jax.json`.

The published layouts look the same whatever autoencoder, input range or crop made them. Latents
that were prepared here carry this record, so that training can refuse those of another codec.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ig_jax.errors import UserError
from ig_jax.io import files

PROVENANCE_FILE = "ig_jax.json"


@dataclass(frozen=True)
class Record:
    codec: str  # by its name in configs: sd_vae, va_vae
    autoencoder: str  # SHA-256 of the file with its weights; '': not known
    image_size: int  # side of the images; 0: not known
    crop: str  # 'center-crop-dhariwal'; '': not known
    input_range: tuple[float, ...]  # of pixels as the autoencoder saw them; (): not known
    examples: int
    skipped: tuple[str, ...]  # examples that could not be read, with the reason
    mean: tuple[float, ...]  # of every latent channel, as stored, over all examples
    std: tuple[float, ...]
    source: dict[str, Any]  # the config section of where they come from
    versions: dict[str, str]  # of the software


# What JSON has for each of them, and what may be in it; (): anything.
_TYPES: dict[str, tuple[type, tuple[type, ...]]] = {
    "str": (str, ()),
    "int": (int, ()),
    "tuple[float, ...]": (list, (int, float)),
    "tuple[str, ...]": (list, (str,)),
    "dict[str, str]": (dict, (str,)),
    "dict[str, Any]": (dict, ()),
}


class Recorded(ABC):
    """Base of sources of latents: the record in the folder `path`, and the codec it names."""

    path: str

    @property
    @abstractmethod
    def _codec_of_layout(self) -> str:
        """Whose latents these are where no record tells it."""

    @cached_property
    def _record(self) -> Record | None:
        return read(Path(self.path))

    @property
    def codec(self) -> str:
        return self._record.codec if self._record else self._codec_of_layout

    def record(self) -> Record | None:
        return self._record


def parse(content: bytes | str, file: str) -> Record:
    """The record in a file's content.

    Raises:
      UserError: it is no record; names `file`.
    """
    try:
        found = files.parse_json(content, file)
        known = {f.name: _typed(found[f.name], f.type) for f in dataclasses.fields(Record)}
    except (UserError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: is cut off or no record of latents; prepare them again, or remove it to use "
            "them unchecked"
        ) from error
    return Record(**known)


def _typed(value: Any, declared: str) -> Any:
    """`value` as JSON has it, if it is of the type with this name; a list becomes a tuple.

    Raises:
      TypeError: it is not.
    """
    kind, inner = _TYPES[declared]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if type(value) is not kind or (inner and any(type(item) not in inner for item in items)):
        raise TypeError(f"a {type(value).__name__} where {declared} belongs")
    return tuple(value) if kind is list else value


def read(folder: Path) -> Record | None:
    """The record in a folder; None where there is none."""
    file = folder / PROVENANCE_FILE
    return parse(files.read_bytes(file), str(file)) if file.exists() else None


def dumps(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), indent=2) + "\n"
