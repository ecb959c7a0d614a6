"""Linear classifiers on frozen features, one for each cell of a grid, trained together.

The loss of every classifier is the mean cross-entropy of a batch, and Adam treats every number
alone, so that each is trained as if it were the only one. Weights start at zero: the problem is
convex. With `norm = "batch"` each channel is first brought to mean 0 and variance 1, by the batch
while training and by running averages later, without a scale or shift of its own: the habit of MAE
(arXiv 2111.06377, appendix A), since a linear classifier is sensitive to the scale of its inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from ig_jax.types import Abstract, Params

Features = Float[Array, "t l b d"]  # of b images in a grid of cells: t noise levels, l blocks
Logits = Float[Array, "t l b k"]
PerCell = Float[Array, "t l"]

# Of BatchNorm, as MAE and PyTorch have them.
EPSILON, MOMENTUM = 1e-6, 0.1


@struct.dataclass
class ProbeState:
    """All that a step changes."""

    step: Int[Array, ""] | Abstract
    heads: Params  # kernel [t, l, d, k], bias [t, l, 1, k]
    opt_state: Any
    mean: Float[Array, "t l 1 d"] | Abstract  # running averages of batch normalisation
    variance: Float[Array, "t l 1 d"] | Abstract


@dataclass(frozen=True)
class LinearProbes:
    """Classifiers of features [t, l, b, width] in `classes` classes.

    Attributes:
      grid: (t, l), how many cells.
      width: channels of a feature.
      classes: at least 2.
      steps: of the whole training; the learning rate falls to 0 along a cosine.
      learning_rate: at the first step.
      weight_decay: decoupled, times the learning rate.
      norm: `none`, or `batch`: normalisation without affine.
    """

    grid: tuple[int, int]
    width: int
    classes: int
    steps: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    norm: str = "none"

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(self.learning_rate, self.steps)
        return optax.adamw(rate, weight_decay=self.weight_decay)

    def init(self) -> ProbeState:
        """The state before the first step."""
        heads = {
            "kernel": jnp.zeros((*self.grid, self.width, self.classes)),
            "bias": jnp.zeros((*self.grid, 1, self.classes)),
        }
        moments = (*self.grid, 1, self.width)
        return ProbeState(
            step=jnp.int32(0),
            heads=heads,
            opt_state=self._optimizer.init(heads),
            mean=jnp.zeros(moments),
            variance=jnp.ones(moments),
        )

    def update(
        self, state: ProbeState, features: Features, labels: Int[Array, "b"]
    ) -> tuple[ProbeState, PerCell]:
        """One step of every classifier on a batch of at least two; its losses before the step."""
        mean, variance = state.mean, state.variance
        if self.norm == "batch":
            batch_mean = features.mean(axis=2, keepdims=True)
            batch_variance = features.var(axis=2, keepdims=True)
            features = _normalised(features, batch_mean, batch_variance)
            n = features.shape[2]
            mean += MOMENTUM * (batch_mean - mean)
            variance += MOMENTUM * (batch_variance * (n / (n - 1)) - variance)

        def loss(heads: Params) -> tuple[Float[Array, ""], PerCell]:
            each = cross_entropy(_logits(heads, features), labels)
            return each.sum(), each

        grads, losses = jax.grad(loss, has_aux=True)(state.heads)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.heads)
        heads = optax.apply_updates(state.heads, updates)
        return ProbeState(state.step + 1, heads, opt_state, mean, variance), losses

    def logits(self, state: ProbeState, features: Features) -> Logits:
        """Unnormalised log probabilities of the classes."""
        if self.norm == "batch":
            features = _normalised(features, state.mean, state.variance)
        return _logits(state.heads, features)

    def flops_per_image(self) -> int:
        """FLOPs of all classifiers' step on one image: products, three times forward."""
        return 6 * math.prod(self.grid) * self.width * self.classes


def _normalised(features: Features, mean: Array, variance: Array) -> Features:
    return (features - mean) * lax.rsqrt(variance + EPSILON)


def _logits(heads: Params, features: Features) -> Logits:
    product = jnp.matmul(features, heads["kernel"], precision=lax.Precision.HIGHEST)
    return product + heads["bias"]


def cross_entropy(logits: Logits, labels: Int[Array, "b"]) -> PerCell:
    """Mean cross-entropy of each cell, nats."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_p, labels[None, None, :, None], axis=-1)
    return -chosen[..., 0].mean(axis=-1)
