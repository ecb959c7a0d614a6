"""Threads that read the many small pieces of a batch at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

THREADS = 8  # they hide the latency of a disk or network, more than there are cores


class Readers:
    """Started at the first use, and kept."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(THREADS)

    def each(self, read: Callable[[int], Any], indices: np.ndarray) -> Iterator[Any]:
        """`read(index)` of every index, in their order."""

        def several(part: np.ndarray) -> list[Any]:
            return [read(index) for index in part.tolist()]

        parts = self._pool.map(several, np.array_split(indices, THREADS))
        return itertools.chain.from_iterable(parts)
