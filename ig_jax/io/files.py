"""Files as bytes: only regular ones are read, JSON of bounded depth, writes that a crash survives.

Every reader of this package opens files here, and every writer replaces them here, so that each of
these rules is in one place.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ig_jax.errors import UserError

DEEPEST = 64  # levels of lists and objects in a JSON file; our own have ten at most
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
COPY_AGAIN = "copy or download it again"


def open_regular(path: str | Path) -> IO[bytes]:
    """Opens a regular file, or a link to one, for reading; unbuffered.

    A pipe would wait for its other end for ever, and a device may have no end.

    Raises:
      UserError: it is something else, absent or unreadable; names it.
    """
    try:
        _require_regular(path, os.stat(path).st_mode)
        # Without blocking: what the name stands for may have changed since.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _require_regular(path, os.fstat(descriptor).st_mode)
            return open(descriptor, "rb", buffering=0)
        except BaseException:
            os.close(descriptor)
            raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot be read ({reason}); restore the file or the right to read it"
        ) from error


def _require_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise UserError(f"{path}: is {kind}; name a regular file")


def read_bytes(path: str | Path, at_most: int | None = None) -> bytes:
    """The whole content of a regular file.

    Raises:
      UserError: as `open_regular`, or it has more than `at_most` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if at_most is not None and size > at_most:
            raise UserError(
                f"{path}: has {size:,} bytes, but such a file has at most {at_most:,}; name or "
                "copy another"
            )
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def mapped(file: IO[bytes]) -> mmap.mmap:
    """The bytes of an open regular file, read-only, where they lie: read from the disk when used.

    They outlive the open file, which must stay as it is for as long as they are in use.

    Raises:
      UserError: there are none, or the system refuses; does not name the file.
    """
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        if os.fstat(file.fileno()).st_size == 0:
            raise UserError(f"is cut off, an empty file; {COPY_AGAIN}") from None
        raise UserError(f"cannot be mapped into memory ({error})") from error


def parse_json(content: bytes | str, place: str) -> Any:
    """The value of a JSON text, nested `DEEPEST` levels at most, no object with a key twice.

    Args:
      place: what to call the text in messages: its file.

    Raises:
      UserError: it is cut off, not JSON, too deep, or names a key twice.
    """
    try:
        value = json.loads(content, object_pairs_hook=_without_duplicates)
    except _DuplicateKey as error:
        raise UserError(f"{place}: names {str(error)[:200]!r} twice; keep one of them") from None
    except RecursionError:
        raise UserError(f"{place}: is nested more than {DEEPEST} levels deep") from None
    except ValueError as error:  # of JSON, of UTF-8, of a number with too many digits
        raise UserError(f"{place}: is cut off or no JSON; {COPY_AGAIN}") from error
    if _depth(value) > DEEPEST:
        raise UserError(f"{place}: is nested more than {DEEPEST} levels deep")
    return value


def _depth(value: Any) -> int:
    """Levels of lists and objects, without recursion."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, list | dict)]:
        depth += 1
        level = [
            x for outer in level for x in (outer if isinstance(outer, list) else outer.values())
        ]
    return depth


class _DuplicateKey(Exception):
    """A key that an object of JSON has twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key)
        found[key] = value
    return found


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
      UserError: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path), str(path))


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to: it takes the place of `path` if all goes well.

    The content is on the disk before the name changes, and the change before this returns: after a
    power loss there is the old file or the new one, never an empty one. After an exception the old
    file is there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file, or leaves the old one."""
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """As `write_text`: indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
