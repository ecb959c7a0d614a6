"""Arrays of an .npz file, mapped into memory where they lie; and such files, without a copy.

An .npz is a zip of .npy files, each the name of an array plus `.npy`. `numpy.savez` stores them as
they are, so that an array is a range of bytes of the file; `numpy.savez_compressed` does not.
numpy itself reads either kind whole, and writes only what is in memory.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from ig_jax.errors import UserError, listed
from ig_jax.io import files, npy
from ig_jax.io.mapped_zip import MappedZip

_COPY_AGAIN = "download or copy it again"
_RESAVE = "re-save it with numpy.savez"
SUFFIX = ".npy"
STREAMED = 2**20  # bytes at a time


def names(path: Path) -> list[str]:
    """Names of the arrays in the file, in its order.

    Raises:
      UserError: the file is absent or no .npz.
    """
    with _opened(path) as archive:
        return _names(archive)


def read_array(path: Path, name: str) -> np.ndarray:
    """One array, of any shape, dtype and order.

    It is a read-only view of the file, which must stay as it is for as long as the array is in use;
    read whole if the file is compressed.

    Raises:
      UserError: the file is absent, damaged, encrypted or no .npz, it has no such array, or the
        array holds Python objects.
    """
    with _opened(path) as archive:
        if name not in _names(archive):
            raise UserError(f"has no array {name!r}; it holds {listed(_names(archive))}")
        member = archive.members[name + SUFFIX]
        if member.is_encrypted:
            raise UserError(f"has its array {name!r} encrypted; {_RESAVE}")
        if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"has its array {name!r} compressed as numpy does not; {_RESAVE}")
        try:
            return npy.array(archive.content(name + SUFFIX))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error


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
                    npy_format.write_array(target, member, allow_pickle=False)


@contextmanager
def _opened(path: Path) -> Iterator[MappedZip]:
    """The zip; makes errors of what is read from it name the file."""
    with files.open_regular(path) as file:
        try:
            yield MappedZip(file)
        except UserError as refusal:
            raise UserError(f"{path}: {refusal}") from None
        except ValueError as error:
            raise UserError(f"{path}: is no .npz, or damaged ({error}); {_COPY_AGAIN}") from error


def _names(archive: MappedZip) -> list[str]:
    return [name.removesuffix(SUFFIX) for name in archive.members if name.endswith(SUFFIX)]
