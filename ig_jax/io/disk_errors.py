"""Disks that are full, read-only, broken or gone: which errors say so, and in what words.

A program that cannot go on ends with one sentence, whoever met the error first: this package, or a
library that writes for it, in a thread of its own and with the system's number in a text.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ig_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a file larger than it may be
AGAIN = "and run the same command again: what is done is kept"
# The system's number -> what to do, of disks and of single files.
_OF_DISKS = {
    **dict.fromkeys(FULL, "make room"),
    errno.EROFS: "mount it for writing",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "restore the right to write there"),
    errno.EIO: "check the disk (dmesg tells more)",
    **dict.fromkeys(
        (errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV, errno.ENXIO),
        "mount it again",
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
}
_OF_FILES = {
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ELOOP),
        "leave its files alone while a program works there",
    ),
    errno.ENAMETOOLONG: "choose a shorter path",
}
_IN_TEXT = re.compile(r"os_error_code='(\d+)'")  # as tensorstore tells it


def number(error: BaseException | None) -> int | None:
    """The system's number of what went wrong with a file, from an error or what it came from."""
    known = {**_OF_DISKS, **_OF_FILES}
    while error is not None:
        in_text = _IN_TEXT.search(str(error))
        found = int(in_text[1]) if in_text else getattr(error, "errno", None)
        if found in known:
            return found
        if error.__cause__ is None:
            # It came up while another was handled, which may be as usual as an absent file.
            known = _OF_DISKS
        error = error.__cause__ or error.__context__
    return None


def room(folder: Path) -> str:
    """Describes the space that is left for a folder."""
    return f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free for {folder}"


def _sentence(error: BaseException, found: int, folder: Path) -> str:
    reason = os.strerror(found)
    if found in FULL:
        reason += f" ({room(folder)})"
    return f"{_place(error, folder)}: {reason}; {(_OF_DISKS | _OF_FILES)[found]}, {AGAIN}"


def _place(error: BaseException, folder: Path) -> str:
    name = getattr(error, "filename", None)
    return str(folder) if name is None else os.fsdecode(name)


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Turns what a disk raises inside into a sentence; `folder` is where the work is done.

    Raises:
      UserError: the disk is full, read-only, broken or gone, or the folder was removed.
    """
    there = folder.exists()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if there and not folder.exists():
            raise UserError(
                f"{folder}: was removed while a program worked in it; run the same command again"
            ) from error
        found = number(error)
        if found is None:
            raise
        raise UserError(_sentence(error, found, folder)) from error
