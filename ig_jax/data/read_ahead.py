"""Examples of a source in batches, read ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ig_jax.errors import BadExample
from ig_jax.types import Source

AHEAD = 3  # batches being read while one is encoded


class Example(NamedTuple):
    index: int  # in the source
    row: np.ndarray  # as the source holds it: an image or a latent
    label: int
    name: str


class Unreadable(NamedTuple):
    reason: str  # names the file


# Batches of examples -> float32 [n, h, w, c] of each, as the data set will hold them.
Encode = Callable[[Iterator[list[Example]]], Iterator[np.ndarray]]


def _read(source: Source, index: int) -> Example | Unreadable:
    try:
        batch = source.batch(np.array([index]))
    except BadExample as error:
        return Unreadable(str(error))
    name = source.name(index) if hasattr(source, "name") else f"{index:08d}"
    return Example(index, batch["stored"][0], int(batch["label"][0]), name)


def read_batches(
    source: Source, indices: range, size: int, readers: ThreadPoolExecutor
) -> Iterator[list[Example | Unreadable]]:
    """The examples in batches, some being read ahead."""
    waiting = deque(indices[i : i + size] for i in range(0, len(indices), size))
    reading: deque[list[Future]] = deque()
    while waiting or reading:
        while waiting and len(reading) <= AHEAD:
            reading.append([readers.submit(_read, source, i) for i in waiting.popleft()])
        yield [future.result() for future in reading.popleft()]


def as_they_are(batches: Iterator[list[Example]]) -> Iterator[np.ndarray]:
    """Latents need no encoding."""
    for examples in batches:
        yield np.stack([x.row for x in examples])
