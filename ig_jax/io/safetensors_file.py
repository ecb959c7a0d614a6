"""Arrays of a safetensors file as ranges of its bytes, which are mapped into memory.

The format: 8 bytes with the length of a header; the header, JSON, with dtype, shape and place of
every array; then the arrays, one after the other. The library that defines it reads whole arrays
only; here they stay on the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ig_jax.errors import UserError, shown
from ig_jax.io import array_bounds, files

LENGTH = 8  # bytes that tell how long the header is
_LONGEST = 100_000_000  # bytes of a header, as in the library
METADATA = "__metadata__"
WIDTHS = {  # bytes of an element, by the format's name of its dtype
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


class Entry(NamedTuple):
    """An array: its dtype as the format calls it, its shape, and its bytes (uint8)."""

    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray


def read(path: Path) -> dict[str, Entry]:
    """The arrays by their names, in the order of the header; nothing but the header is read.

    The file must stay as it is for as long as an entry is in use.

    Raises:
      UserError: the file is absent, cut off or no safetensors file; names it.
    """
    with files.open_regular(path) as file:
        try:
            content = np.frombuffer(files.mapped(file), np.uint8)
        except UserError as refusal:
            raise UserError(f"{path}: {refusal}") from None
    end = LENGTH + int.from_bytes(content[:LENGTH].tobytes(), "little")
    if content.size < LENGTH or end > min(content.size, LENGTH + _LONGEST):
        raise UserError(f"{path}: is cut off or no safetensors file; {files.COPY_AGAIN}")
    header = files.parse_json(content[LENGTH:end].tobytes(), str(path))
    try:
        return _entries(header, content[end:])
    except ValueError as error:
        raise UserError(
            f"{path}: is cut off or no safetensors file ({error}); {files.COPY_AGAIN}"
        ) from error


def _entries(header: Any, data: np.ndarray) -> dict[str, Entry]:
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    places = {name: _place(name, e) for name, e in header.items() if name != METADATA}
    end = 0
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start != end:
            raise ValueError(f"{shown(name)} begins at byte {shown(start)}, not {shown(end)}")
        end = stop
    if end != data.size:
        raise ValueError(f"its arrays are of {shown(end)} bytes, but {data.size} are there")
    return {name: _entry(name, header[name], data[slice(*places[name])]) for name in places}


def _place(name: str, entry: Any) -> tuple[int, int]:
    """The first byte, and that behind the last."""
    match entry:
        case {"dtype": str(), "shape": list(), "data_offsets": [start, stop]}:
            # By their types: JSON has true, which is an int here.
            if type(start) is type(stop) is int and 0 <= start <= stop:
                return start, stop
            raise ValueError(f"{shown(name)} lies at bytes {shown([start, stop])}")
    raise ValueError(f"{shown(name)} is {shown(entry)}, not dtype, shape and data_offsets")


def _entry(name: str, entry: dict[str, Any], raw: np.ndarray) -> Entry:
    dtype, shape = entry["dtype"], entry["shape"]
    if dtype in WIDTHS:  # of others there may be less than a byte an element
        try:
            array_bounds.require_fit(shape, WIDTHS[dtype], raw.size)
        except ValueError as error:
            raise ValueError(f"{shown(name)}: {error}") from error
    return Entry(dtype, tuple(shape), raw)
