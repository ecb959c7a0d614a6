"""Many small files below one place, which is a folder or an uncompressed zip of it.

Names are relative to the place, with forward slashes. A zip is one memory map: a member is a range
of its bytes, and no file is opened to read it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

from ig_jax.errors import UserError
from ig_jax.formats import files
from ig_jax.formats.mapped_zip import MappedZip

NAMED = 3  # files that a complaint about many lists


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
        for folder, _, names in os.walk(self._root):
            below = os.path.relpath(folder, self._root).replace(os.sep, "/")
            found += names if below == "." else [f"{below}/{name}" for name in names]
        return found

    def read(self, name: str) -> bytes:
        return files.read_bytes(self.place(name))

    def place(self, name: str) -> str:
        return f"{self._root}/{name}"


class Zip:
    """Of the folder `inside` where the archive has it, else of the whole."""

    def __init__(self, path: Path, inside: str):
        self._zip, self._prefix = _opened(path), f"{inside}/"
        if not any(name.startswith(self._prefix) for name in self._zip.members):
            self._prefix = ""
        self._place = f"{path}/{self._prefix}"

    def names(self) -> Collection[str]:
        return [
            name.removeprefix(self._prefix)
            for name in self._zip.members
            if name.startswith(self._prefix)
        ]

    def read(self, name: str) -> bytes:
        try:
            return self._zip.stored(self._prefix + name).tobytes()
        except ValueError as error:
            raise UserError(
                f"{self.place(name)}: is damaged ({error}); copy the zip again"
            ) from error

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


def _opened(path: Path) -> MappedZip:
    with files.open_regular(path) as file:
        try:
            opened = MappedZip(file)
        except UserError as refusal:
            raise UserError(f"{path}: {refusal}") from None
        except ValueError as error:
            raise UserError(
                f"{path}: is cut off or no zip file ({error}); copy it again"
            ) from error
    packed = [name for name, member in opened.members.items() if not member.is_stored]
    if packed:
        raise UserError(
            f"{path}: {some(packed)} compressed or encrypted; zip without either (zip -0)"
        )
    return opened
