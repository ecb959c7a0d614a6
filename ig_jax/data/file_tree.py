"""Many small files below one place, which is a folder or an uncompressed zip of it.

Names are relative to the place, with forward slashes. A zip is one memory map: a member is a range
of its bytes, and no file is opened to read it.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

from ig_jax.errors import UserError

NAMED = 3  # files that a complaint about many lists
ZIP_LENGTHS = 26  # where a member's own header has the lengths of its name and its extra field
ZIP_NAME = 30  # where they begin; the content follows


@runtime_checkable
class FileTree(Protocol):
    """Read access, from several threads at once."""

    def names(self) -> Collection[str]: ...

    def read(self, name: str) -> bytes: ...

    def place(self, name: str) -> str:
        """What to call a file when talking to the user."""
        ...


class Folder:
    def __init__(self, root: str):
        self._root = root

    def names(self) -> list[str]:
        found = []
        for folder, _, files in os.walk(self._root):
            below = os.path.relpath(folder, self._root).replace(os.sep, "/")
            found += files if below == "." else [f"{below}/{file}" for file in files]
        return found

    def read(self, name: str) -> bytes:
        try:
            # Unbuffered: the whole file comes in one read.
            with open(self.place(name), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise UserError(
                f"{self.place(name)}: cannot be read ({error.strerror}); restore the file or the "
                "right to read it"
            ) from error

    def place(self, name: str) -> str:
        return f"{self._root}/{name}"


class Zip:
    """Of the folder `inside` where the archive has it, else of the whole."""

    def __init__(self, path: Path, inside: str):
        members, prefix = _members(path), f"{inside}/"
        if not any(m.filename.startswith(prefix) for m in members):
            prefix = ""
        self._place = f"{path}/{prefix}"
        self._ranges = {
            m.filename.removeprefix(prefix): (m.header_offset, m.file_size)
            for m in members
            if m.filename.startswith(prefix)
        }
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def names(self) -> Collection[str]:
        return self._ranges

    def read(self, name: str) -> bytes:
        start, size = self._ranges[name]
        # The directory at the end of a zip does not know how long these are beside the member.
        start += ZIP_NAME + sum(struct.unpack_from("<HH", self._bytes, start + ZIP_LENGTHS))
        return self._bytes[start : start + size]

    def place(self, name: str) -> str:
        return f"{self._place}{name}"


def find(path: Path, inside: str) -> FileTree:
    """The tree in the folder `inside` of `path` where there is one, else in `path` itself.

    Raises:
      UserError: there is no such folder or zip, or the zip is cut off or compressed.
    """
    if path.is_dir():
        return Folder(str(path / inside if (path / inside).is_dir() else path))
    if not path.is_file() or path.suffix != ".zip":
        raise UserError(f"{path}: is neither a folder nor a .zip file; path must name one of them")
    return Zip(path, inside)


def some(names: list[str]) -> str:
    """'a, b, c and 4 others are', for a sentence to go on from."""
    named, others = ", ".join(names[:NAMED]), len(names) - NAMED
    if others > 0:
        return f"{named} and {others} others are"
    return f"{named} are" if len(names) > 1 else f"{named} is"


def _members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: is cut off or no zip file; copy it again") from error
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UserError(f"{path}: {some(packed)} compressed; zip without compression (zip -0)")
    return members
