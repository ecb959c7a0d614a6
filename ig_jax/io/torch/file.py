"""Weights from PyTorch's .pt and .pth files, without PyTorch and without running what they hold.

Since PyTorch 1.6 such a file is a zip of uncompressed members under one folder: `data.pkl`, a
pickle of the saved object, and `data/<key>`, the raw elements of one storage. Older ones are read
by torch_legacy.py. The file is mapped into memory once, and each array is a read-only view of that
map, so that a value is read from the disk when it is used.

The pickle is read by plain_pickle.py, which runs nothing that it names; torch_tensors.py has the
names of PyTorch that are known.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np

from ig_jax.errors import UserError, shown
from ig_jax.io import files, mapped_zip
from ig_jax.io.mapped_zip import MappedZip
from ig_jax.io.torch import legacy_file, unpickler
from ig_jax.io.torch import tensors as torch_tensors
from ig_jax.io.torch.tensors import DOWNLOAD_AGAIN, RESAVE

# What reading a damaged file may raise.
_DAMAGE = (ValueError, TypeError, LookupError, OverflowError, EOFError, struct.error)


def load(path: str | Path) -> Any:
    """The saved object: dicts, lists, tuples, sets, numbers, text, and read-only arrays.

    A tensor or parameter becomes an array of its own dtype (bfloat16 from ml_dtypes) and strides
    over the memory-mapped file, which must stay as it is for as long as an array is in use. An
    OrderedDict becomes a dict, without its attributes; an argparse.Namespace becomes a Record.

    Raises:
      UserError: the file is absent, damaged, compressed, big-endian, or a tar file as PyTorch's
        first releases wrote, or it holds anything but the above.
    """
    with files.open_regular(path) as file:
        try:
            return _read(file)
        except UserError as refusal:
            raise UserError(f"{path}: {refusal}") from None
        except _DAMAGE as error:
            raise UserError(
                f"{path}: its contents are damaged ({error}); {DOWNLOAD_AGAIN}"
            ) from error


def _read(file: IO[bytes]) -> Any:
    start = file.read(len(mapped_zip.START))
    if start == mapped_zip.START:
        archive = _Archive(file)
        loaded = unpickler.run(
            archive.pickle, torch_tensors.MAKERS, torch_tensors.STORAGES, archive.storage
        )
    elif start.startswith(legacy_file.START):
        loaded = legacy_file.read(file)
    else:
        raise UserError(f"is no file of torch.save (neither a zip nor a pickle); {RESAVE}")
    torch_tensors.require_no_more(loaded, file.seek(0, os.SEEK_END))
    return loaded


class _Archive:
    """The members of the zip as views of the one mapped file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = MappedZip(file)
        self._folder = self._only_folder()
        order = f"{self._folder}/byteorder"
        if order in self._zip.members and bytes(self._member(order)) != b"little":
            raise UserError(torch_tensors.BIG_ENDIAN)
        self.pickle = bytes(self._member(f"{self._folder}/data.pkl"))

    def _only_folder(self) -> str:
        names = self._zip.members
        folders = [name.removesuffix("/data.pkl") for name in names if "/data.pkl" in name]
        if len(folders) != 1 or "/" in folders[0]:
            raise UserError(f"is a zip, but not one of torch.save (no <name>/data.pkl); {RESAVE}")
        return folders[0]

    def _member(self, name: str) -> np.ndarray:
        """The bytes of a member (uint8)."""
        if name not in self._zip.members:
            raise UserError(f"lacks its member {shown(name)}; {DOWNLOAD_AGAIN}")
        if not self._zip.members[name].is_stored:
            raise UserError(f"has its member {shown(name)} compressed or encrypted; {RESAVE}")
        return self._zip.stored(name)

    def storage(self, persistent_id: Any) -> torch_tensors.Storage:
        """The elements that ('storage', type, key, device, number of elements) stands for."""
        match persistent_id:
            case ("storage", unpickler.Name(dotted), str(key), str(), int(numel)):
                dtype = torch_tensors.dtype_of(dotted)
                raw = self._member(f"{self._folder}/data/{key}")
                return torch_tensors.checked_storage(key, raw, dtype, numel)
        raise UserError(f"refers to something other than a storage; {unpickler.MEND}")
