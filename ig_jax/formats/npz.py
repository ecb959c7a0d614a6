"""Arrays of an .npz file, mapped into memory where they lie; and such files, without a copy.

An .npz is a zip of .npy files, each the name of an array plus `.npy`. `numpy.savez` stores them as
they are, so that an array is a range of bytes of the file; `numpy.savez_compressed` does not.
numpy itself reads either kind whole, and writes only what is in memory.
"""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ig_jax.errors import UserError
from ig_jax.formats import files

COPY_AGAIN = "download or copy it again"
RESAVE = "re-save it with numpy.savez"
SUFFIX = ".npy"
STREAMED = 2**20  # bytes at a time

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# What reading a damaged zip or .npy may raise; zipfile raises NotImplementedError for a way of
# compressing that it does not know.
DAMAGE = (
    *(ValueError, LookupError, OverflowError, EOFError, NotImplementedError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)


def names(path: Path) -> list[str]:
    """Names of the arrays in the file, in its order.

    Raises:
      UserError: the file is absent or no .npz.
    """
    with _opened(path) as archive:
        return _names(archive)


def array(path: Path, name: str) -> np.ndarray:
    """One array, of any shape, dtype and order.

    It is a read-only view of the file, which must stay as it is for as long as the array is in use;
    read whole if the file is compressed.

    Raises:
      UserError: the file is absent, damaged, encrypted or no .npz, it has no such array, or the
        array holds Python objects.
    """
    with _opened(path) as archive:
        if name not in _names(archive):
            known = ", ".join(map(repr, _names(archive))) or "nothing"
            raise UserError(f"{path}: has no array {name!r}; it holds {known}")
        member = archive.getinfo(name + SUFFIX)
        if member.flag_bits & 1:
            raise UserError(f"{path}: has its array {name!r} encrypted; {RESAVE}")
        if member.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, member)
        with archive.open(member) as content:
            return npy.read_array(content, allow_pickle=False)


def write(path: Path, members: Mapping[str, Path | np.ndarray]) -> None:
    """Writes an uncompressed .npz; the file is whole or absent, and the same members always give
    the same bytes.

    A member that is a Path names an .npy file, which is streamed: it may be larger than the memory.
    """
    with files.replaced(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, member in members.items():
            # Its time of change is fixed: ZipInfo's own default, the beginning of 1980.
            entry = zipfile.ZipInfo(name + SUFFIX)
            with archive.open(entry, "w", force_zip64=True) as target:
                if isinstance(member, Path):
                    with open(member, "rb") as source:
                        shutil.copyfileobj(source, target, STREAMED)
                else:
                    npy.write_array(target, member, allow_pickle=False)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip; turns what reading it may raise into a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DAMAGE as error:
        raise UserError(f"{path}: is no .npz, or damaged ({error}); {COPY_AGAIN}") from error


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(SUFFIX) for name in archive.namelist() if name.endswith(SUFFIX)]


def _mapped(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """The view of a stored member, found by its local header; its checksum is not read."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22x2H", file.read(30))
        if signature != b"PK\x03\x04":
            raise ValueError(f"no member where {member.filename} should begin")
        start = file.seek(name_length + extra_length, os.SEEK_CUR)
        shape, fortran, dtype = HEADERS[npy.read_magic(file)](file)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds Python objects")
    bytes_of_array = dtype.itemsize * int(np.prod(shape, dtype=object))
    if offset - start + bytes_of_array != member.file_size:
        raise ValueError(f"{member.filename} is not as long as its header says")
    whole = np.memmap(path, np.uint8, mode="r")
    return np.ndarray(shape, dtype, whole, offset, order="F" if fortran else "C")
