"""The direction of the final velocity: 1 - cosine similarity over channels, mean over positions.

LightningDiT (arXiv 2501.01423) adds it to the squared error of the final output only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ig_jax.objectives.base import NoisedBatch, Term
from ig_jax.types import NONE, Params, PerExample

SMALLEST_NORM = 1e-8  # as published; a prediction that starts at zero then has a huge gradient,
# which clipping brings to its direction


@dataclass(frozen=True)
class Cosine(Term):
    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        return jnp.mean(1 - similarity(batch.out.pred, batch.target), axis=(1, 2))


def similarity(a: Float[Array, "... c"], b: Float[Array, "... c"]) -> Float[Array, "..."]:
    """Cosine of the angle between a and b, over the last axis."""
    dot = jnp.sum(a * b, axis=-1)
    # Bounded before the root: at zero the gradient of a norm is not a number.
    squares = [jnp.sum(x**2, axis=-1) for x in (a, b)]
    norms = [jnp.sqrt(jnp.maximum(s, SMALLEST_NORM**2)) for s in squares]
    return dot / (norms[0] * norms[1])
