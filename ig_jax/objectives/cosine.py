"""The direction of the final velocity: 1 - cosine similarity over channels, mean over positions.

LightningDiT (arXiv 2501.01423) adds it to the squared error of the final output only.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from ig_jax.objectives.base import NoisedBatch, require_weight
from ig_jax.types import PerExample

SMALLEST_NORM = 1e-8  # as published; a prediction that starts at zero then has a huge gradient,
# which clipping brings to its direction


@dataclass(frozen=True)
class Cosine:
    weight: float

    def __post_init__(self):
        require_weight(self.weight)

    def check(self, readouts: tuple[int, ...]) -> None:
        pass  # reads only the final prediction, which every network has

    def __call__(self, p: NoisedBatch) -> PerExample:
        dot = jnp.sum(p.out.pred * p.target, axis=-1)
        # Bounded before the root: at zero the gradient of a norm is not a number.
        squares = [jnp.sum(x**2, axis=-1) for x in (p.out.pred, p.target)]
        norms = [jnp.sqrt(jnp.maximum(s, SMALLEST_NORM**2)) for s in squares]
        return jnp.mean(1 - dot / (norms[0] * norms[1]), axis=(1, 2))
