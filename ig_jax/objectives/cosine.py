"""The direction of the final velocity: 1 - cosine similarity over channels, mean over positions.

LightningDiT (arXiv 2501.01423) adds it to the squared error of the final output only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ig_jax.objectives.base import NoisedBatch, Term
from ig_jax.objectives.distances import similarity
from ig_jax.types import NONE, Params, PerExample


@dataclass(frozen=True)
class Cosine(Term):
    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        return jnp.mean(1 - similarity(batch.out.pred, batch.target), axis=(1, 2))
