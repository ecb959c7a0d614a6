"""PyTorch's files from before version 1.6, which newer versions still write when told to.

Such a file is five pickles, one after the other, and then the storages:

  a magic number, the format's version, a dict about the machine, the saved object, a list of keys;
  for each of the keys, in their order: the number of elements (int64), and the raw elements.

Numbers are little-endian, and nothing is padded, so that elements may lie at any byte. The object
refers to a storage by ('storage', type, key, device, number of elements, part); the part is None,
or (its own key, offset, number of elements) for a storage that is a part of the one with that key.

How wide the elements of a storage are is said in the object alone, and where they are only after
it. So the object's pickle is read twice: for the types, and, once the storages are found, for the
object.
"""

from __future__ import annotations

import mmap
import struct
from typing import IO, Any, NamedTuple

import numpy as np

from ig_jax.errors import UserError, shown
from ig_jax.io import files
from ig_jax.io.torch import tensors as torch_tensors
from ig_jax.io.torch import unpickler
from ig_jax.io.torch.tensors import DOWNLOAD_AGAIN, MAKERS, RESAVE, STORAGES, Storage

START = b"\x80"  # of a pickle of protocol 2 or higher
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
NO_TENSORS = dict.fromkeys(MAKERS, lambda *_: None)


def read(file: IO[bytes]) -> Any:
    """The saved object, its arrays read-only views of the mapped file, as `torch_file.load` has it.

    Raises, without the file's name:
      UserError: the file is of another kind, big-endian or damaged, or it holds more than weights.
      ValueError, TypeError, LookupError, struct.error: it is damaged.
    """
    mapped = files.mapped(file)
    _check_header(mapped)
    storages, start = _Storages(), mapped.tell()
    unpickler.run(mapped, NO_TENSORS, STORAGES, storages.note)
    storages.find(mapped, _header_pickle(mapped))
    mapped.seek(start)
    return unpickler.run(mapped, MAKERS, STORAGES, storages.get)


def _check_header(mapped: mmap.mmap) -> None:
    if _header_pickle(mapped) != _MAGIC:
        raise UserError(f"is a pickle, but not one of torch.save (no magic number); {RESAVE}")
    if _header_pickle(mapped) != _VERSION:
        raise UserError(f"is of another version of PyTorch's format than {_VERSION}; {RESAVE}")
    if _header_pickle(mapped)["little_endian"] is not True:
        raise UserError(torch_tensors.BIG_ENDIAN)


def _header_pickle(mapped: mmap.mmap) -> Any:
    return unpickler.run(mapped, {}, (), _parsed)


class _Reference(NamedTuple):
    """A persistent id: a storage, and the part of it that is meant, in elements."""

    key: str
    dtype: np.dtype
    numel: int
    part: slice


def _parsed(persistent_id: Any) -> _Reference:
    match persistent_id:
        case ("storage", unpickler.Name(dotted), str(key), str(), int(numel), part):
            dtype = torch_tensors.dtype_of(dotted)
        case _:
            raise UserError(f"refers to something other than a storage; {unpickler.MEND}")
    match part:
        case None:
            return _Reference(key, dtype, numel, slice(0, numel))
        case (str(), int(offset), int(size)) if 0 <= offset <= offset + size <= numel:
            return _Reference(key, dtype, numel, slice(offset, offset + size))
    raise UserError(f"has a part of its storage {shown(key)} that leaves it; {DOWNLOAD_AGAIN}")


class _Storages:
    """The storages of a file: noted from the object, found in the file, got for the object."""

    def __init__(self) -> None:
        self._noted: dict[str, tuple[np.dtype, int]] = {}
        self._found: dict[str, Storage] = {}

    def note(self, persistent_id: Any) -> None:
        key, dtype, numel, _ = _parsed(persistent_id)
        if self._noted.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise UserError(
                f"refers to its storage {shown(key)} as two different ones; {DOWNLOAD_AGAIN}"
            )

    def find(self, mapped: mmap.mmap, keys: Any) -> None:
        """Reads where each storage is, from where the file stands."""
        raw = np.frombuffer(mapped, np.uint8)
        for key in keys:
            # A deeply nested tuple would overflow the stack of Python itself when hashed.
            if not isinstance(key, str) or key not in self._noted:
                raise UserError(f"lists a storage that nothing in it refers to; {DOWNLOAD_AGAIN}")
            dtype, numel = self._noted[key]
            (count,) = struct.unpack("<q", mapped.read(8))
            if count != numel:
                raise UserError(
                    f"its storage {shown(key)} has {count} elements, but is referred to as one of "
                    f"{shown(numel)}; {DOWNLOAD_AGAIN}"
                )
            start = mapped.tell()
            end = start + numel * dtype.itemsize
            self._found[key] = torch_tensors.checked_storage(key, raw[start:end], dtype, numel)
            mapped.seek(end)

    def get(self, persistent_id: Any) -> Storage:
        key, dtype, _, part = _parsed(persistent_id)
        if key not in self._found:
            raise UserError(f"lacks its storage {shown(key)}; {DOWNLOAD_AGAIN}")
        start, end = part.start * dtype.itemsize, part.stop * dtype.itemsize
        return Storage(self._found[key].raw[start:end], dtype)
