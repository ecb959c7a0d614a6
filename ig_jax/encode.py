"""Examples of a source on their way to a data set of latents: read ahead, encoded in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from ig_jax import prng, sharding
from ig_jax.build import Experiment
from ig_jax.errors import BadExample
from ig_jax.types import Params, Source

AHEAD = 3  # batches being read while one is encoded


class Example(NamedTuple):
    index: int  # in the source
    row: np.ndarray  # as the source holds it: a picture or a latent
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


class Encoder:
    """Batches of pictures -> float32 [n, h, w, c] as the data set will hold them."""

    def __init__(self, exp: Experiment):
        self._mesh, self._size = exp.own_mesh, exp.config.prepare.batch_size
        whole, rows = sharding.replicated(self._mesh), sharding.over_batch(self._mesh)
        self._weights = jax.device_put(exp.encoder_weights, whole)

        def encode(batch: dict[str, jax.Array], weights: Params) -> jax.Array:
            keys = prng.keys(exp.config.seed, "prepare", batch["index"])
            return exp.config.data.codec.to_store(batch["picture"], weights, keys)

        self._program = jax.jit(encode, in_shardings=(rows, whole), out_shardings=rows)

    def _start(self, examples: list[Example]) -> jax.Array:
        """Sets the devices to work."""
        # Padded, so that one program does them all.
        filled = examples + examples[-1:] * (self._size - len(examples))
        batch = {"picture": np.stack([x.row for x in filled])}
        batch["index"] = np.array([x.index for x in filled], np.int32)
        return self._program(sharding.to_global(batch, self._mesh, self._size), self._weights)

    def __call__(self, batches: Iterator[list[Example]]) -> Iterator[np.ndarray]:
        """One batch behind, so that the devices need not wait for the next."""
        started = ((self._start(examples), len(examples)) for examples in batches)
        for stored, count in sharding.one_ahead(started):
            yield sharding.to_host(stored)[:count]
