"""The header of an .npy file, without evaluating it as Python.

The format: a magic string, two bytes of version, the length of the header (two bytes in version 1,
else four), and a Python dict with 'descr' (how numpy writes a dtype), 'fortran_order' and 'shape'.
numpy's own reader hands that text to Python's parser, which raises whatever it likes. Here it is
matched against what writers of arrays of numbers and text write: no records, no Python objects.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from ig_jax.errors import shown
from ig_jax.io import array_bounds

_MAGIC = b"\x93NUMPY"
_ENCODINGS = {
    1: (2, "latin1"),
    2: (4, "latin1"),
    3: (4, "utf8"),
}  # version -> bytes of length, text
BEFORE = len(_MAGIC) + 2 + 4  # bytes before the header, at most
LONGEST = 10_000  # bytes of a header, as numpy itself allows; usually there are 118

ENTRY = re.compile(
    r"""\s*(['"])(?P<key>descr|fortran_order|shape)\1\s*:\s*"""
    r"""(?:\((?P<shape>[\d\sL,]*)\)|(?P<flag>True|False)|(['"])(?P<dtype>[^'"]*)\5)\s*(?:,|\Z)"""
)
AXIS = re.compile(r"\s*(\d{1,18})L?\s*")  # Python 2 wrote 5L
DTYPE = re.compile(r"[<>|=]?[?biufcSUV]\d{0,8}")
_KINDS = {"descr": "dtype", "fortran_order": "flag", "shape": "shape"}  # key -> its kind of value


class Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool  # first axis fastest
    dtype: np.dtype
    version: int
    length: int  # bytes before the elements

    def view(self, content: Any) -> np.ndarray:
        """The array, a view of the bytes of the whole .npy file: a bytes-like object.

        Raises:
          ValueError: it is shorter or longer than the header says.
        """
        array_bounds.require_fit(self.shape, self.dtype.itemsize, len(content) - self.length)
        order = "F" if self.fortran else "C"
        return np.ndarray(self.shape, self.dtype, content, self.length, order=order)


def header(content: Any) -> Header:
    """The header of a whole .npy file: a bytes-like object.

    Raises:
      ValueError: there is none, or one of anything but numbers and text.
    """
    start = bytes(content[: BEFORE + LONGEST])
    if len(start) < BEFORE or not start.startswith(_MAGIC) or start[6] not in _ENCODINGS:
        raise ValueError("it does not begin as an .npy file does")
    width, encoding = _ENCODINGS[start[6]]
    begin = len(_MAGIC) + 2 + width
    end = begin + int.from_bytes(start[begin - width : begin], "little")
    if end - begin > LONGEST:
        raise ValueError(f"a header of {end - begin:,} bytes is more than the {LONGEST:,} allowed")
    if end > len(start):
        raise ValueError("it ends within its header")
    values = _entries(start[begin:end].decode(encoding).strip())
    return Header(
        _shape(values["shape"]),
        values["fortran_order"] == "True",
        _dtype(values["descr"]),
        start[6],
        end,
    )


def array(content: Any) -> np.ndarray:
    """The array in a whole .npy file, a view of its bytes.

    Raises:
      ValueError: as `header` and `Header.view`.
    """
    return header(content).view(content)


def _entries(text: str) -> dict[str, str]:
    """The text of the three values by their keys."""
    values, place, end = {}, 1, len(text) - 1
    while text[:1] == "{" and text[-1] == "}" and (found := ENTRY.match(text, place, end)):
        value = found[_KINDS[found["key"]]]
        if value is None or found["key"] in values:
            break
        values[found["key"]], place = value, found.end()
    if len(values) < len(_KINDS) or text[place:end].strip():
        raise ValueError(f"its header {shown(text)} is not that of an array of numbers or text")
    return values


def _shape(text: str) -> tuple[int, ...]:
    axes = text.split(",")
    if not axes[-1].strip():  # behind the last comma, or between the brackets of ()
        axes.pop()
    found = [AXIS.fullmatch(axis) for axis in axes]
    if not all(found):
        raise ValueError(f"({shown(text)}) is no shape")
    return tuple(int(axis[1]) for axis in found)


def _dtype(text: str) -> np.dtype:
    if text.endswith("O"):
        raise ValueError("it holds Python objects")
    try:
        if DTYPE.fullmatch(text):
            return np.dtype(text)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{shown(text)} is no dtype of numbers or text")
