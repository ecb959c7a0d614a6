"""SHA-256 of files: whether two are one."""

import hashlib
from pathlib import Path


def of_file(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
