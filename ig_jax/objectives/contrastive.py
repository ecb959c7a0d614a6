"""Contrastive self-distillation: an image's feature is told from those of all other images.

  f   = mean over tokens of LayerNorm(h_d)             h_d: tokens after block d; no scale, no bias
  q_i = unit(predictor(projector(f(x_i at t_i))))      the network that trains; t_i as it is drawn
  k_i = unit(projector'(f'(x'_i at t')))               its average (the teacher), without gradient
  L_i = tau (-log softmax_j(q_i k_j / tau)_i - log softmax_j(k_i q_j / tau)_i)

j runs over all images of the batch, on whatever devices. Both directions of one pair of views, each
as MoCo v3 weighs its cross-entropy, 2 tau, and their mean: where nothing is told from anything, L
is 2 tau ln(batch size). MoCo v3 gets its second direction by exchanging the views; the network
would see every image twice. Here it sees the image of the batch, as without the term, so that the
choice of the other view leaves no trace in what is generated, and needs no condition.

The teacher's view x' has noise of its own, its label is not dropped, and its time t' is fixed. It
is the mirror image ("mirrored"): of VA-VAE's latents the other of the two stored copies, of those
of the SD-VAE the latent turned left to right, of images the flipped one, encoded; or the very
latent of the batch ("same"), where left and right are not alike.

Projector: D -> H -> H -> F, predictor: F -> H -> F, without biases; each layer is normalized over
the batch, by its own statistics alone, then scaled, shifted and cut below 0, but for the last ones.

Sources: DDAE++, arXiv 2505.10999, of which neither code nor settings of this part are published:
this is our reading. Heads and loss: MoCo v3 (arXiv 2104.02057) and its code, whose H is 4096.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ig_jax.bounds import at_most
from ig_jax.errors import require_all
from ig_jax.models.network import Network
from ig_jax.models.transformer import WIDEST
from ig_jax.objectives import heads
from ig_jax.objectives.base import Needs, NoisedBatch, Term
from ig_jax.objectives.distances import unit
from ig_jax.types import NONE, BatchRows, Key, Latents, Params, PerExample, Tokens

VIEWS = ("mirrored", "same")
PROJECTOR, PREDICTOR = "projector", "predictor"  # parts of the head


@dataclass(frozen=True)
class Contrastive(Term):
    """Cross-entropy of finding an image's teacher feature in the batch, and the reverse."""

    depth: int  # d, from 1: the block whose tokens are compared
    tau: float = 0.2  # temperature of the softmax
    teacher_time: float = 0.1  # t'; 0 is data
    view: str = "mirrored"  # of the teacher
    hidden_size: int = at_most(WIDEST, 4096)  # H
    features: int = at_most(WIDEST, 256)  # F
    # Over what a layer of the heads is normalized: "batch", all images; "layer", an image's values,
    # for batches too small for statistics.
    norm: str = "batch"

    pooled: ClassVar[bool] = True
    averaged: ClassVar[tuple[str, ...]] = (PROJECTOR,)

    def __post_init__(self):
        super().__post_init__()
        rules = [
            ("tau", self.tau > 0, "must be above 0; MoCo v3 has 0.2 for ViTs"),
            ("teacher_time", 0 <= self.teacher_time <= 1, "must lie in [0, 1]; 0 is data"),
            ("view", self.view in VIEWS, f"must be one of {', '.join(VIEWS)}"),
            ("hidden_size", self.hidden_size >= 1, "must be at least 1; MoCo v3 has 4096"),
            ("features", self.features >= 2, "must be at least 2; MoCo v3 has 256"),
            ("norm", self.norm in heads.NORMS, f"must be one of {', '.join(heads.NORMS)}"),
        ]
        require_all(self, rules)

    @property
    def needs(self) -> Needs:
        return Needs(
            taps=(self.depth,),
            teacher_taps=(self.depth,),
            mirrored=self.view == "mirrored",
            whole_batch=True,
        )

    def init(self, key: Key, net: Network) -> Params:
        width, hidden, features = net.settings.hidden_size, self.hidden_size, self.features
        projector, predictor = jax.random.split(key)
        return {
            PROJECTOR: heads.init_normalized_mlp(projector, (width, hidden, hidden, features)),
            PREDICTOR: heads.init_normalized_mlp(predictor, (features, hidden, features)),
        }

    def draw(self, key: Key, x0: Latents) -> Latents:
        """The noise of the teacher's view."""
        return jax.random.normal(key, x0.shape, jnp.float32)

    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        project = partial(
            heads.apply_normalized_mlp, norm=self.norm, rows=batch.rows, dtype=batch.dtype
        )
        student = project(head[PROJECTOR], pool(batch.out.features[self.depth]))
        queries = unit(project(head[PREDICTOR], student))
        keys = unit(project(batch.teacher.head[PROJECTOR], self._teacher_feature(batch, draws)))
        return info_nce(queries, keys, self.tau, batch.rows)

    def _teacher_feature(self, batch: NoisedBatch, noise: Latents) -> Float[Array, "b d"]:
        x0 = batch.mirrored if self.view == "mirrored" else batch.x0
        t = jnp.full(len(x0), self.teacher_time, jnp.float32)
        x_t = batch.process.perturb(x0, noise, t)
        tokens = batch.teacher.tokens(x_t, t, batch.labels, None, (self.depth,))
        return pool(tokens[self.depth])


def pool(tokens: Tokens) -> Float[Array, "b d"]:
    """Mean over tokens of each token normalized over its channels (LayerNorm, eps 1e-6)."""
    return jnp.mean(heads.layer_norm(tokens, epsilon=1e-6), axis=1)


def info_nce(
    queries: Float[Array, "b f"], keys: Float[Array, "b f"], tau: float, rows: BatchRows
) -> PerExample:
    """tau times the cross-entropies of query i among all keys, and of key i among all queries.

    Args:
      queries, keys: unit vectors of this device's rows.
      tau: temperature.
      rows: reads those of the other devices.
    """

    def log_sum(own: Array, others: Array) -> PerExample:
        products = jnp.matmul(own, others.T, precision=jax.lax.Precision.HIGHEST)
        return jax.scipy.special.logsumexp(products / tau, axis=1)

    positive = jnp.sum(queries * keys, axis=1) / tau
    either = log_sum(queries, rows.all(keys)) + log_sum(keys, rows.all(queries))
    return tau * (either - 2 * positive)
