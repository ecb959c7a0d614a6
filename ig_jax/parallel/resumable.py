"""Work on many images in parts, which processes share and a kill at any moment does not undo.

The file of a part is whole or absent, and the same whoever makes it; so is what all are merged to.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from ig_jax.errors import UserError
from ig_jax.monitoring import console
from ig_jax.parallel.processes import barrier, process_slice

_READERS = 16  # images read at the same time; most of that is waiting for files


class Parts(ABC):
    """Images 0..total - 1 in parts of `size`, each with a file in `parts_folder`."""

    def __init__(self, parts_folder: Path, total: int, size: int):
        self.parts_folder = parts_folder
        self.ranges = [range(i, min(i + size, total)) for i in range(0, total, size)]

    @abstractmethod
    def file(self, part: int) -> Path: ...

    @abstractmethod
    def read(self, part: int) -> Any:
        """Reads the file of a part; None or a UserError where it is absent or damaged."""

    @abstractmethod
    def make(self, part: int, readers: ThreadPoolExecutor, bar: Any) -> None:
        """Makes a part, and its file when all else is on the disk; `bar` counts the images."""

    @abstractmethod
    def merge(self, found: Iterator[Any]) -> None:
        """Writes the result of the whole from what the files of all parts hold, in order."""

    def complete(self, what: str) -> None:
        """Does what is left of the work, called `what`, and removes the parts; all must ask.

        Raises:
          UserError: the file of a part was damaged after it was made.
        """
        self.parts_folder.mkdir(exist_ok=True)
        own = process_slice(len(self.ranges))
        left = [i for i in own if self._found(i) is None]
        total, rest = (sum(len(self.ranges[i]) for i in some) for some in (own, left))
        with (
            ThreadPoolExecutor(_READERS) as readers,
            console.progress(total, initial=total - rest, unit="image", what=what) as bar,
        ):
            for part in left:
                self.make(part, readers, bar)
        barrier("parts made")
        if jax.process_index() == 0:
            self.merge(map(self._require, range(len(self.ranges))))
            self.remove()
        barrier("parts merged")

    def remove(self) -> None:
        shutil.rmtree(self.parts_folder, ignore_errors=True)

    def _found(self, part: int) -> Any:
        with suppress(UserError):
            return self.read(part)
        return None

    def _require(self, part: int) -> Any:
        found = self._found(part)
        if found is None:
            raise UserError(f"{self.file(part)}: was damaged meanwhile; run the same command again")
        return found
