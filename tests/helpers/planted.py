"""Features with a known signal, in place of a network's, for tests of probing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.config.probe import DEFAULTS
from ig_jax.evaluation.prober import Prober
from ig_jax.parallel.mesh import make_mesh

TIMES, BLOCKS = (0.3, 0.1, 0.6), (2, 5)
WIDTH, CLASSES = 7, 3


class Planted:
    """Stored features [t, l, d] of images: noise, and at one cell the class as well."""

    stored_shape = (len(TIMES), len(BLOCKS), WIDTH)
    stored_dtype = np.float32
    num_classes = CLASSES

    def __init__(self, size: int, cell: tuple[int, int] | None, seed: int = 0, signal: float = 2.0):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, CLASSES, size).astype(np.int32)
        self.stored = rng.standard_normal((size, *self.stored_shape)).astype(np.float32)
        if cell is not None:
            directions = np.random.default_rng(99).standard_normal((CLASSES, WIDTH))
            self.stored[:, *cell] += (signal * directions[self.labels]).astype(np.float32)
        # Scales and centres of channels, as networks have them.
        self.stored = self.stored * np.float32(3.1) + np.float32(0.7)

    def __len__(self) -> int:
        return len(self.labels)

    def held_out(self) -> None:
        return None

    def batch(self, indices) -> dict[str, np.ndarray]:
        return {"stored": self.stored[indices], "label": self.labels[indices]}


def features(times, blocks):
    """The stored features of chosen cells, as `FeaturesAt`."""
    chosen = np.ix_([TIMES.index(t) for t in times], [BLOCKS.index(b) for b in blocks])

    def of_rows(inputs, batch, step):
        return jnp.moveaxis(batch["stored"][:, *chosen], 0, 2)

    return of_rows


def prober(devices=None, **settings) -> Prober:
    """Of the planted features, on the given devices or on the first."""
    mesh = make_mesh(jax.devices()[:1] if devices is None else devices)
    given = {"times": TIMES, "blocks": BLOCKS, "batch_size": 32, "epochs": 20.0, **settings}
    probe = dataclasses.replace(DEFAULTS, **given)
    return Prober(features, {}, WIDTH, CLASSES, TIMES, BLOCKS, probe, mesh)
