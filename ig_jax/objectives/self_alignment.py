"""Self-Representation Alignment (SRA): early tokens learn from later ones at less noise.

  L = d( MLP(h_a(x_t, t)), sg(h'_b(x_t', t')) ),    t' = clip(t - max_interval u, 0, 1),  u uniform

h_a are the tokens after block a of the network that trains, h'_b those after a later block b of its
average (the teacher), on the same data, noise and labels. The head is D -> 2D -> D with SiLU; the
teacher has none. Distances d, their means over what is left:

  cosine_tokens  1 - cosine similarity along the *token* axis, for each channel: what the published
                 code computes
  cosine         1 - cosine similarity along the channels, for each token
  smooth_l1      e^2 / (2 beta) where |e| < beta, else |e| - beta / 2; the paper's, with beta 0.05
  l1, l2         |e|, e^2

Published weights: 0.5 for cosine_tokens. For the others 0.2 (a DiT: 0.04), until epoch 149 (at 512
pixels: 99), then falling to a tenth over 1000 (800) epochs.

Source: arXiv 2505.02831, section 3, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ig_jax.errors import shown
from ig_jax.models.network import Network
from ig_jax.objectives import heads
from ig_jax.objectives.base import Needs, NoisedBatch, Term
from ig_jax.objectives.distances import similarity, smooth_l1
from ig_jax.types import NONE, Key, Latents, Params, PerExample, Times, Tokens

# (projected student, teacher, beta) -> [b, ...], of which the mean over all but b is taken
DISTANCES: dict[str, Callable[[Tokens, Tokens, float], Any]] = {
    "cosine_tokens": lambda a, b, beta: 1 - similarity(a, b, axis=1),
    "cosine": lambda a, b, beta: 1 - similarity(a, b),
    "smooth_l1": lambda a, b, beta: smooth_l1(a - b, beta),
    "l1": lambda a, b, beta: jnp.abs(a - b),
    "l2": lambda a, b, beta: (a - b) ** 2,
}


@dataclass(frozen=True)
class SelfAlignment(Term):
    """Distance of a block's projected tokens to those of a later block of the teacher."""

    depth: int  # a, from 1: the block that learns; published: B 3, L 6, XL 8
    teacher_depth: int  # b; published: B 8, L 16, XL 20 (DiT-XL 16)
    max_interval: float = 0.2  # the most by which the teacher's time is earlier
    distance: str = "cosine_tokens"
    beta: float = 0.05  # of smooth_l1

    def __post_init__(self):
        super().__post_init__()
        rules = [
            ("max_interval", 0 <= self.max_interval <= 1, "must lie in [0, 1]; published: 0.2"),
            ("distance", self.distance in DISTANCES, f"must be one of {', '.join(DISTANCES)}"),
            ("beta", self.beta > 0, "must be above 0; published: 0.05"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} = {shown(getattr(self, name))}: {rule}")

    @property
    def needs(self) -> Needs:
        return Needs(taps=(self.depth,), teacher_taps=(self.teacher_depth,))

    def init(self, key: Key, net: Network) -> Params:
        width = net.settings.hidden_size
        return heads.mlp(key, (width, 2 * width, width))

    def draw(self, key: Key, x0: Latents) -> Times:
        """u, uniform in [0, 1)."""
        return jax.random.uniform(key, (x0.shape[0],), jnp.float32)

    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        t = batch.process.less_noisy(batch.t, draws, self.max_interval)
        x_t = batch.process.perturb(batch.x0, batch.noise, t)
        target = batch.teacher.tokens(x_t, t, batch.y, (self.teacher_depth,))[self.teacher_depth]
        student = heads.apply_mlp(head, batch.out.features[self.depth], batch.dtype)
        return jnp.mean(DISTANCES[self.distance](student, target, self.beta).reshape(len(t), -1), 1)
