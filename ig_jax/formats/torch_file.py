"""Weights from PyTorch's .pt and .pth files, without PyTorch and without running what they hold.

Since PyTorch 1.6 such a file is a zip of uncompressed members under one folder: `data.pkl`, a
pickle of the saved object, and `data/<key>`, the raw elements of one storage. Older ones are read
by torch_legacy.py. The file is mapped into memory once, and each array is a read-only view of that
map, so that a value is read from the disk when it is used.

The pickle is read by plain_pickle.py, which runs nothing that it names; torch_tensors.py has the
names of PyTorch that are known.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.errors import UserError
from ig_jax.formats import plain_pickle, torch_legacy, torch_tensors
from ig_jax.formats.torch_tensors import COPY_AGAIN, RESAVE

ZIP_START = b"PK\x03\x04"

# What reading a damaged zip or pickle may raise; zipfile raises NotImplementedError for a way of
# compressing that it does not know.
DAMAGE = (
    *(ValueError, TypeError, LookupError, OverflowError, EOFError, NotImplementedError),
    *(struct.error, zipfile.BadZipFile),
)


def load(path: str | Path) -> Any:
    """The saved object: dicts, lists, tuples, sets, numbers, text, and read-only arrays.

    A tensor or parameter becomes an array of its own dtype (bfloat16 from ml_dtypes) and strides
    over the memory-mapped file, which must stay as it is for as long as an array is in use. An
    OrderedDict becomes a dict, without its attributes; an argparse.Namespace becomes a Record.

    Raises:
      UserError: the file is absent, damaged, compressed, big-endian, or a tar file as PyTorch's
        first releases wrote, or it holds anything but the above.
    """
    try:
        return _reader_of(path)(Path(path))
    except UserError as refusal:
        raise UserError(f"{path}: {refusal}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DAMAGE as error:
        raise UserError(f"{path}: its contents are damaged ({error}); {COPY_AGAIN}") from error


# The file


def _reader_of(path: str | Path) -> Callable[[Path], Any]:
    with open(path, "rb") as file:
        start = file.read(4)
    if start == ZIP_START:
        return _read_zip
    if start[:1] == torch_legacy.START:
        return torch_legacy.read
    raise UserError(f"is no file of torch.save (neither a zip nor a pickle); {RESAVE}")


def _read_zip(path: Path) -> Any:
    archive = _Archive(path)
    return plain_pickle.run(
        archive.pickle, torch_tensors.MAKERS, torch_tensors.STORAGES, archive.storage
    )


class _Archive:
    """The members of the zip as views of the one mapped file."""

    def __init__(self, path: Path) -> None:
        # One map for all: each map would hold a file descriptor of its own.
        self._bytes = np.memmap(path, np.uint8, mode="r")
        try:
            with zipfile.ZipFile(path) as opened:
                self._members = {member.filename: member for member in opened.infolist()}
        except zipfile.BadZipFile as error:
            raise UserError(f"is cut short or damaged ({error}); {COPY_AGAIN}") from error
        self._folder = self._only_folder()
        order = f"{self._folder}/byteorder"
        if order in self._members and bytes(self._member(order)) != b"little":
            raise UserError(torch_tensors.BIG_ENDIAN)
        self.pickle = bytes(self._member(f"{self._folder}/data.pkl"))

    def _only_folder(self) -> str:
        folders = [name.removesuffix("/data.pkl") for name in self._members if "/data.pkl" in name]
        if len(folders) != 1 or "/" in folders[0]:
            raise UserError(f"is a zip, but not one of torch.save (no <name>/data.pkl); {RESAVE}")
        return folders[0]

    def _member(self, name: str) -> np.ndarray:
        """The bytes of a member (uint8), found by its local header; its checksum is not read."""
        if name not in self._members:
            raise UserError(f"lacks its member {name!r}; {COPY_AGAIN}")
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise UserError(f"has its member {name!r} compressed or encrypted; {RESAVE}")
        header = bytes(self._bytes[member.header_offset :][:30])
        name_length, extra_length = struct.unpack("<26x2H", header)
        start = member.header_offset + 30 + name_length + extra_length
        end = start + member.file_size
        if header[:4] != ZIP_START or end > self._bytes.size:
            raise UserError(f"has its member {name!r} out of place; {COPY_AGAIN}")
        return self._bytes[start:end]

    def storage(self, persistent_id: Any) -> torch_tensors.Storage:
        """The elements that ('storage', type, key, device, number of elements) stands for."""
        match persistent_id:
            case ("storage", plain_pickle.Name(dotted), str(key), str(), int(numel)):
                dtype = torch_tensors.dtype_of(dotted)
                raw = self._member(f"{self._folder}/data/{key}")
                return torch_tensors.checked_storage(key, raw, dtype, numel)
        raise UserError(f"refers to something other than a storage; {plain_pickle.MEND}")
