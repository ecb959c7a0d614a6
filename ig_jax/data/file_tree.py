"""Many small files below one place, which is a folder or an uncompressed zip of it.

Names are relative to the place, with forward slashes; those of folders end in one. Hidden names,
which begin with a dot, and `__MACOSX` are no data, at any depth: desktops and notebooks make them.
A zip is one memory map: a member is a range of its bytes, and no file is opened to read it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

from ig_jax.errors import UserError
from ig_jax.io import files
from ig_jax.io.mapped_zip import MappedZip

NAMED = 3  # files that a complaint about many lists
_LARGEST = 2**30  # bytes of one file; there are many, so each is small
NO_DATA = ("__MACOSX", "lost+found")  # what systems put beside data, apart from hidden names
MOST_WAYS = 64  # of links to the same folder: each multiplies what is below it

_Identity = tuple[int, int]  # of a folder, whatever leads to it: device and inode


@runtime_checkable
class FileTree(Protocol):
    """Read access, from several threads at once."""

    def names(self) -> Collection[str]:
        """Of all files, and of folders: these end in a slash. Not of the hidden ones."""
        ...

    def read(self, name: str) -> bytes: ...

    def place(self, name: str) -> str:
        """Name of a file in messages."""
        ...


def _is_data(name: str) -> bool:
    """Returns whether no part of a name is hidden or one of `NO_DATA`."""
    return not any(part.startswith(".") or part in NO_DATA for part in name.split("/"))


class Folder:
    """Links are followed, but for those to a folder that they lie in."""

    def __init__(self, root: str):
        self._root = root

    def names(self) -> list[str]:
        found: list[str] = []
        ways: Counter[_Identity] = Counter()
        waiting: list[tuple[str, frozenset[_Identity]]] = [("", frozenset())]
        while waiting:
            folder, above = waiting.pop()
            identity, entries = self._listed(folder)
            if identity in above:
                continue
            ways[identity] += 1
            if ways[identity] > MOST_WAYS:
                raise UserError(
                    f"{self.place(folder)}: is reached in more than {MOST_WAYS} ways; remove links "
                    "to it or to the folders above it"
                )
            found.append(folder)
            for entry in entries:
                name = f"{folder}{entry.name}"
                if not _is_data(entry.name):
                    continue
                if entry.is_symlink() and not os.path.exists(entry.path):
                    raise UserError(
                        f"{self.place(name)}: is a link to nothing; restore what it leads to, or "
                        "remove it"
                    )
                if not entry.is_dir():
                    found.append(name)
                elif not (entry.is_symlink() and _leads_up(entry.path)):
                    waiting.append((f"{name}/", above | {identity}))
        return found[1:]  # without the root

    def _listed(self, folder: str) -> tuple[_Identity, list[os.DirEntry]]:
        """Lists the folder that a name ('' or 'a/b/') stands for, with what is in it."""
        place = self.place(folder)
        try:
            status = os.stat(place)
            with os.scandir(place) as entries:
                return (status.st_dev, status.st_ino), list(entries)
        except OSError as error:
            raise UserError(
                f"{place}: cannot be listed ({error.strerror}); restore the folder or the right to "
                "read it"
            ) from error

    def read(self, name: str) -> bytes:
        return files.read_bytes(self.place(name), _LARGEST)

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
        below = (
            name.removeprefix(self._prefix)
            for name in self._zip.members
            if name.startswith(self._prefix)
        )
        return [name for name in below if _is_data(name)]

    def read(self, name: str) -> bytes:
        try:
            return self._zip.stored(self._prefix + name).tobytes()
        except ValueError as error:
            raise UserError(
                f"{self.place(name)}: is damaged ({error}); copy the zip again"
            ) from error

    def place(self, name: str) -> str:
        return f"{self._place}{name}"


def _leads_up(link: str) -> bool:
    """Returns whether a link to a folder leads to one that it lies in itself."""
    target, own = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return os.path.commonpath([target, own]) == target


def find(path: Path, inside: str) -> FileTree:
    """The tree in the folder `inside` of `path` where there is one, else in `path` itself.

    Raises:
      UserError: there is no such folder or zip, or the zip is cut off or compressed.
    """
    if os.path.isdir(path):  # unlike Path's own, it never raises
        return Folder(str(path / inside if os.path.isdir(path / inside) else path))
    if not os.path.isfile(path) or path.suffix != ".zip":
        raise UserError(f"{path}: is neither a folder nor a .zip file; path must name one of them")
    return Zip(path, inside)


def list_names(names: list[str]) -> str:
    """'a, b, c and 4 others'."""
    named, others = ", ".join(names[:NAMED]), len(names) - NAMED
    return f"{named} and {others} others" if others > 0 else named


def some(names: list[str]) -> str:
    """'a, b, c and 4 others are', for a sentence to go on from."""
    return f"{list_names(names)} {'are' if len(names) > 1 else 'is'}"


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
    links = [name for name, member in opened.members.items() if member.is_link]
    if links:
        raise UserError(f"{path}: {some(links)} only a link; zip what it leads to (without -y)")
    return opened
