"""Arrays on disk that are filled row by row: in any order, over several runs, by several processes.

A folder holds a .npy file for each array and `done.npy` with a byte for each row. A row is marked
once its values are on the disk, so that after a kill at any moment, or the loss of the machine, it
is known which rows are left. Files are written at offsets, not through a mapping: processes of
other hosts may write neighbouring rows of the same page, and a full disk is an OSError.
"""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.lib import format as npy_format

from ig_jax.errors import UserError
from ig_jax.io import files, npy

DONE = "done"


class Row(NamedTuple):
    """Shape and dtype of one row of an array."""

    shape: tuple[int, ...]
    dtype: Any  # of numpy


class RowStore:
    """`rows` rows of the named `arrays` in `folder`."""

    def __init__(self, folder: Path, rows: int, arrays: Mapping[str, Row]):
        self.folder, self.rows = folder, rows
        self._arrays = {**arrays, DONE: Row((), np.uint8)}

    @property
    def names(self) -> list[str]:
        return [name for name in self._arrays if name != DONE]

    def create(self) -> None:
        """Makes the files unless they are there and whole; one process does it, before any writes.

        If one is damaged, all begin anew.
        """
        if all(map(self._is_whole, self._arrays)):
            return
        self.path(DONE).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self._arrays:  # `done` comes last: with it the store exists
            with files.replaced(self.path(name)) as hidden, open(hidden, "wb") as file:
                file.write(self._header(name))
                file.truncate(self._length(name))  # which takes no room on the disk yet

    def _header(self, name: str) -> bytes:
        row, header = self._arrays[name], io.BytesIO()
        kind = {"descr": npy_format.dtype_to_descr(np.dtype(row.dtype)), "fortran_order": False}
        npy_format.write_array_header_1_0(header, kind | {"shape": (self.rows, *row.shape)})
        return header.getvalue()

    def _size(self, name: str) -> int:
        """Bytes of a row of an array."""
        row = self._arrays[name]
        return math.prod(row.shape) * np.dtype(row.dtype).itemsize

    def _length(self, name: str) -> int:
        return len(self._header(name)) + self.rows * self._size(name)

    def _is_whole(self, name: str) -> bool:
        """Returns whether the file of an array is there, with its header and at its length."""
        file, header = self.path(name), self._header(name)
        if not file.is_file() or file.stat().st_size != self._length(name):
            return False
        with files.open_regular(file) as content:
            return content.read(len(header)) == header

    def path(self, name: str) -> Path:
        """The .npy file of an array."""
        return self.folder / f"{name}.npy"

    def read(self, name: str) -> np.ndarray:
        """An array as it is now, mapped from its file; rows that were not written are zeros.

        Raises:
          UserError: the file is absent or damaged.
        """
        path, row = self.path(name), self._arrays[name]
        with files.open_regular(path) as file:
            try:
                found = npy.array(memoryview(files.mapped(file)))
            except (UserError, ValueError) as error:
                raise UserError(f"{path}: is damaged ({error}); remove {self.folder}") from error
        if found.shape != (self.rows, *row.shape) or found.dtype != row.dtype:
            raise UserError(
                f"{path}: holds {found.dtype} {found.shape}, not {np.dtype(row.dtype)} "
                f"{(self.rows, *row.shape)}; remove {self.folder}"
            )
        return found

    def done(self, indices: Int[np.ndarray, "n"]) -> np.ndarray:
        """Returns which rows are written, bool [n]."""
        return self.read(DONE)[indices] == 1

    def write(self, indices: Int[np.ndarray, "n"], values: Mapping[str, np.ndarray]) -> None:
        """Rows `indices` of all arrays, each [n, ...].

        Raises:
          OSError: there is no room for them; what is not marked does no harm.
        """
        for name, found in values.items():
            self._put(name, indices, found)
        self._put(DONE, indices, np.ones(len(indices)))

    def _put(self, name: str, indices: np.ndarray, values: np.ndarray) -> None:
        row = self._arrays[name]
        values = np.ascontiguousarray(values, row.dtype)
        if values.shape != (len(indices), *row.shape):
            raise ValueError(f"{name}: has shape {values.shape}, not {(len(indices), *row.shape)}")
        size, start = self._size(name), len(self._header(name))
        with open(self.path(name), "r+b", buffering=0) as file:
            # Runs of neighbours in one go.
            for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices) != 1) + 1):
                data, offset = values[run].tobytes(), start + int(indices[run[0]]) * size
                while data:  # a disk that is nearly full may take less than it is given
                    written = os.pwrite(file.fileno(), data, offset)
                    data, offset = data[written:], offset + written
            os.fsync(file.fileno())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
