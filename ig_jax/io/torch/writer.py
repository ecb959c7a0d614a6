"""Writes a dict of float32 arrays as torch.save does, for published loaders that expect that.

The container is described in `torch_file.py`. The pickle is put together from opcodes, because
pickling a PyTorch function by name would need PyTorch.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ig_jax.io import files

NEWEST_TIME = (1980, 1, 1, 0, 0, 0)  # a fixed one, so that equal arrays make equal files


def save(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes {name: tensor} to `file`, which torch.load reads with weights_only=True."""
    members = {
        "data.pkl": _pickle(arrays),
        "byteorder": b"little",
        **{f"data/{i}": np.ascontiguousarray(a, "<f4").tobytes() for i, a in _numbered(arrays)},
        "version": b"3\n",
    }
    with files.replaced(file) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"{file.stem}/{name}", NEWEST_TIME), content)


def _numbered(arrays: Mapping[str, np.ndarray]) -> list[tuple[int, np.ndarray]]:
    return list(enumerate(arrays.values()))


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    items = [
        _text(name) + _tensor(i, a.shape)
        for name, (i, a) in zip(arrays, _numbered(arrays), strict=True)
    ]
    start = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK
    return start + b"".join(items) + pickle.SETITEMS + pickle.STOP


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _number(number: int) -> bytes:
    return pickle.BININT + number.to_bytes(4, "little", signed=True)


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tensor(key: int, shape: tuple[int, ...]) -> bytes:
    """_rebuild_tensor_v2(storage, offset 0, size, strides, requires_grad False, no hooks)."""
    size = int(np.prod(shape))
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    kind = _global("torch", "FloatStorage")
    storage = _tuple(_text("storage"), kind, _text(str(key)), _text("cpu"), _number(size))
    no_hooks = _global("collections", "OrderedDict") + _tuple() + pickle.REDUCE
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + _tuple(
            storage + pickle.BINPERSID,
            _number(0),
            _tuple(*map(_number, shape)),
            _tuple(*map(_number, strides)),
            pickle.NEWFALSE,
            no_hooks,
        )
        + pickle.REDUCE
    )
