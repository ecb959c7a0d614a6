"""Pickles of numpy arrays, of numpy 1 or 2, read without running what they hold.

numpy pickles an array as a call that makes an empty one, and its state: shape, dtype and bytes; or,
in protocol 5, as one call with all of these. A dtype is a call with its code ('f8'), and a state
that says the order of its bytes. The pickle is read by plain_pickle.py; `_MAKERS` are the names of
numpy that it knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.errors import UserError, shown
from ig_jax.io import array_bounds, files
from ig_jax.io.torch import unpickler

CODES = ("f2", "f4", "f8", "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
_DAMAGE = (ValueError, TypeError, AttributeError, LookupError, OverflowError)


def load(path: Path) -> Any:
    """The saved object: dicts, lists, tuples, sets, numbers, text, bytes and read-only arrays.

    The file must be of pickle protocol 2 or higher, which all versions of numpy's own `dump` are.

    Raises:
      UserError: the file is absent or damaged, or it holds anything but the above.
    """
    content = files.read_bytes(path)
    try:
        return _with_arrays(unpickler.run(content, _MAKERS, INERT, _refer))
    except UserError as refusal:
        raise UserError(f"{path}: {refusal}") from None
    except _DAMAGE as error:
        raise UserError(
            f"{path}: its contents are damaged ({error}); download or copy it again"
        ) from error


class _Dtype(unpickler.Stateful):
    """A dtype of numbers; its state says which byte comes first."""

    def __init__(self, code: Any, _align: Any = False, _copy: Any = True) -> None:
        if not isinstance(code, str) or code not in CODES:
            name = shown(code) if isinstance(code, str) else f"of a {type(code).__name__}"
            raise UserError(f"has an array of dtype {name}; save arrays of numbers only")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        _version, order, *_nothing_of_numbers = state
        self.dtype = self.dtype.newbyteorder(order)


class _Array(unpickler.Stateful):
    """An array whose shape, dtype and bytes are still to come."""

    values: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _version, shape, dtype, columns_first, content = state
        self.values = _from_bytes(content, dtype, shape, "F" if columns_first else "C")


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(content, bytes | bytearray):
        raise TypeError(f"a {type(content).__name__} where the bytes of an array belong")
    array_bounds.require_fit(shape, dtype.dtype.itemsize, len(content))
    values = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)
    values.flags.writeable = False
    return values


def _new_array(_kind: Any, _shape: Any, _code: Any) -> _Array:
    return _Array()


def _scalar(dtype: Any, content: Any) -> Any:
    return _from_bytes(content, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:
    """Decodes bytes as protocol 2 writes them."""
    if encoding != "latin1":
        raise ValueError("bytes written in another encoding than latin1")
    return text.encode("latin1")


def _refer(_) -> None:
    raise UserError(f"refers to something outside of the file; {unpickler.MEND}")


def _with_arrays(value: Any) -> Any:
    """`value` with the arrays in the places of those that were to become them.

    How deep and how large it is has been bounded by `plain_pickle.run`.
    """
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict):
        return {key: _with_arrays(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_arrays(inner) for inner in value)
    return value


CORES = ("numpy.core", "numpy._core")  # of numpy 1, of numpy 2
_MAKERS = {
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",  # which protocol 2 does not encode
    **{f"{core}.multiarray._reconstruct": _new_array for core in CORES},
    **{f"{core}.multiarray.scalar": _scalar for core in CORES},
    **{f"{core}.numeric._frombuffer": _from_bytes for core in CORES},
}
INERT = {"numpy.ndarray"}
