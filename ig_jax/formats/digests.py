"""SHA-256 of files: whether two are one."""

import hashlib
from pathlib import Path

from ig_jax.formats import files


def of_file(path: Path) -> str:
    with files.open_regular(path) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
