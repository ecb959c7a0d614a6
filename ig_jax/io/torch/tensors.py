"""PyTorch's names in a pickle as NumPy: storages, the tensors over them, parameters.

A tensor is a view of a storage: an offset, a size and a stride per axis, all counted in elements;
two tensors may share a storage. The names in `STORAGES` and `MAKERS` are those of PyTorch that are
known; nothing is looked up by them.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ig_jax.errors import UserError, shown
from ig_jax.io import array_bounds
from ig_jax.io.torch import unpickler

STORAGES = {
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
    "torch.storage.UntypedStorage": np.dtype("u1"),  # of the types below, which name themselves
}
# Newer PyTorch's types of elements, each by the name of its storage and by its own: refused.
NEWER = {
    f"torch.{name}"
    for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
    for name in (f"Float8_{kind}Storage", f"float8_{kind}")
} | {f"torch.{name}" for name in ("uint16", "uint32", "uint64", "bits8", "bits16")}
STORAGES |= dict.fromkeys(NEWER)

_MOST_SHARED = 8  # times that the bytes of a file may be in its tensors, as where weights are tied
RESAVE = "re-save it in PyTorch 1.6 or newer with torch.save(torch.load(f), f)"
DOWNLOAD_AGAIN = "download or copy it again"
BIG_ENDIAN = "was saved on a big-endian machine; re-save it on a little-endian one"


class Storage(NamedTuple):
    raw: np.ndarray  # uint8; numpy makes no view of a bfloat16 buffer by offset and stride
    dtype: np.dtype


def dtype_of(storage_type: str) -> np.dtype:
    if storage_type not in STORAGES:
        raise unpickler.refused(storage_type)
    dtype = STORAGES[storage_type]
    if dtype is None:
        raise _newer(storage_type)
    return dtype


def _newer(dotted: str) -> UserError:
    what = "fp8, " if "loat8" in dotted else ""
    return UserError(
        f"holds tensors of type {dotted} ({what}not a type of plain weights); save them as "
        "float32, float16 or bfloat16"
    )


def checked_storage(key: str, raw: np.ndarray, dtype: np.dtype, numel: int) -> Storage:
    """The storage of this key, if its bytes are as many as its elements need."""
    if raw.size != numel * dtype.itemsize:
        raise UserError(
            f"its storage {shown(key)} has {raw.size} bytes, but {shown(numel)} elements of "
            f"{dtype} need {shown(numel * dtype.itemsize)}; {DOWNLOAD_AGAIN}"
        )
    return Storage(raw, dtype)


def require_no_more(loaded: Any, size: int) -> None:
    """Refuses a loaded object whose arrays, copied, would be many times the file of `size` bytes.

    Raises:
      UserError: they would be; does not name the file.
    """
    leaves = unpickler.leaves(loaded, sys.maxsize)  # bounded when it was loaded
    held = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, np.ndarray))
    if held > _MOST_SHARED * size:
        raise UserError(
            f"has tensors of {held:,} bytes that share storages, in a file of {size:,}; save each "
            "on its own with .clone()"
        )


def _tensor(
    storage, offset, size, stride, _requires_grad=False, _hooks=None, metadata=None
) -> np.ndarray:
    """The view of a storage with this offset, size and stride, in elements.

    A stride may be 0, but a tensor has no more elements than its storage: it may be copied.
    """
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise UserError(f"has a tensor without a storage, size or stride; {DOWNLOAD_AGAIN}")
    if len(size) > array_bounds.MOST_AXES or len(size) != len(stride):
        raise UserError(
            f"has a tensor of {len(size)} axes and {len(stride)} strides; {DOWNLOAD_AGAIN}"
        )
    if metadata:
        raise UserError("has a tensor with a pending conjugation or sign; resolve it before saving")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise UserError(f"has a tensor with a negative or broken offset or size; {DOWNLOAD_AGAIN}")
    width = storage.dtype.itemsize
    held = storage.raw.size // width
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset > held or (last >= held and 0 not in size):
        raise UserError(
            f"has a tensor of offset {shown(offset)}, size {shown(size)} and stride "
            f"{shown(stride)}, which leaves its storage of {held} elements; {DOWNLOAD_AGAIN}"
        )
    if math.prod(size) > held:
        raise UserError(
            f"has a tensor of size {shown(size)} expanded from {held} elements; save it with "
            ".contiguous()"
        )
    steps = tuple(step * width for step in stride)
    return np.ndarray(size, storage.dtype, storage.raw, offset * width, steps)


def _tensor_of_newer_type(
    _storage, _offset, _size, _stride, _requires_grad, _hooks, dtype, *_
) -> np.ndarray:
    raise _newer(dtype.dotted if isinstance(dtype, unpickler.Name) else shown(dtype))


def _parameter(data, _requires_grad, _hooks) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise UserError(f"has a parameter without a tensor; {DOWNLOAD_AGAIN}")
    return data


def _size(numbers) -> tuple:
    if type(numbers) is not tuple:
        raise UserError(f"has a torch.Size of something other than a tuple; {DOWNLOAD_AGAIN}")
    return numbers


MAKERS = {
    "torch._utils._rebuild_tensor": _tensor,  # before PyTorch 0.4
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_newer_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
}
