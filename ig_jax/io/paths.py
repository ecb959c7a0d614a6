"""Paths as people write them: `~` is a home folder, and what this machine cannot open is refused.

Every path that comes from outside, by a flag or in a config, passes through `given` where it
enters. What a run records is the path as it was written, so that records can be compared between
machines.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from ig_jax.errors import UserError, shown

# The type of a config's field that names a file or folder; '' there names none.
Location = Annotated[str, "path"]

LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, as Linux has it; elsewhere it is no more
# One slash, too: pathlib makes gs:/bucket of gs://bucket. One letter is no scheme but a drive.
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/")
_BUCKETS = {"gs": "gcsfuse", "s3": "mountpoint-s3", "s3a": "mountpoint-s3", "hdfs": "hdfs-fuse"}


def given(path: str | os.PathLike[str], field: str) -> str:
    """The path to open for what somebody gave as `field`.

    Raises:
      UserError: it is empty, a URL, too long, of an unknown user, or holds a NUL byte.
    """
    text = os.fspath(path)
    named = f"{field} = {shown(text)}"
    if not text.strip():
        raise UserError(f"{named}: is empty; name a path")
    if "\0" in text:
        raise UserError(f"{named}: holds a NUL byte, which no file name can")
    scheme = _SCHEME.match(text)
    if scheme:
        raise UserError(f"{named}: is a URL; {_instead(scheme[1].lower(), text)}")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.split("/")[0]
        raise UserError(f"{named}: there is no home folder of {user}; write ./{user} for a file")
    _require_short(expanded, named)
    return expanded


def _instead(scheme: str, text: str) -> str:
    if scheme == "file":
        return f"write the path alone: {shown('/' + text.split(':', 1)[1].lstrip('/'))}"
    if scheme in ("http", "https", "ftp"):
        return "download it, and name the file"
    tool = _BUCKETS.get(scheme)
    how = f" (with {tool}, for example)" if tool else ""
    return f"mount it as a folder{how} or copy it to this machine, and name the path there"


def _require_short(path: str, named: str) -> None:
    try:
        encoded = os.fsencode(path)
    except ValueError as error:
        raise UserError(f"{named}: cannot be the name of a file ({error})") from error
    if len(encoded) >= LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
        raise UserError(f"{named}: is longer than a name may be; choose a shorter one")
