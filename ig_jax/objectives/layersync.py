"""LayerSync: a block's tokens learn the direction of those of a later block.

  L = -mean over tokens of cos(h_a, sg(h_b)),   cos over channels, a < b

No head, no teacher and no second pass: both token maps leave the pass that trains the network.

Source: arXiv 2510.12581; its SiT-XL/2 uses weight 0.2 and blocks 8 and 16 of 28.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from ig_jax.objectives.base import Needs, NoisedBatch, Term
from ig_jax.objectives.distances import similarity
from ig_jax.types import NONE, Params, PerExample


@dataclass(frozen=True)
class LayerSync(Term):
    """Minus the cosine similarity of two blocks' tokens; in [-1, 1]."""

    depth: int  # a, from 1: the block that learns
    target_depth: int  # b, the later block, through which no gradient goes

    def __post_init__(self):
        super().__post_init__()
        if self.target_depth <= self.depth:
            raise ValueError(
                f"target_depth = {self.target_depth}: must be above depth = {self.depth}, the "
                "block that learns from it; the published XL uses 8 and 16"
            )

    @property
    def needs(self) -> Needs:
        return Needs(taps=(self.depth, self.target_depth))

    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        tokens = batch.out.features
        target = lax.stop_gradient(tokens[self.target_depth])
        return -jnp.mean(similarity(tokens[self.depth], target), axis=1)
