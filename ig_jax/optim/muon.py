"""Muon for the matrices, AdamW for the rest: the optimizer of LightningDiT.

For a matrix p of (out, rest) = (rows, cols) with gradient g:
  m <- beta m + (1 - beta) g
  u = NS((1 - beta) g + beta m) sqrt(max(1, rows / cols))
  p <- (1 - lr weight_decay) p - lr 0.2 sqrt(max(A, B)) u
A and B are the first two dimensions of the published shape before it is flattened: for the patch
convolution its channels out and in. NS makes all singular values about 1 by steps of
  X <- a X + (b G + c G G) X,   G = X X^T,   (a, b, c) = (3.4445, -4.7750, 2.0315),
from X = matrix / (Frobenius norm + 1e-7), turned so that G is the smaller of the two Gram matrices.

`optax.contrib.muon` is not used: it corrects the momentum for its zero start, iterates in the type
of the momentum, adds another epsilon, and has either of the two scales but not both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ig_jax import pytree
from ig_jax.bounds import BELOW_ONE, at_most, below_one
from ig_jax.optim import matrix_axes, schedules, trainable
from ig_jax.optim.trainable import Share, alone
from ig_jax.types import Params

NS_DTYPES = ("bfloat16", "float32")
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7
RMS = 0.2  # an update's root mean square, about that of AdamW's (arXiv 2502.16982)


@dataclass(frozen=True)
class MuonSettings(schedules.Settings):
    """Muon; b1, b2 and eps are those of the AdamW group, weight_decay is of the matrices only.

    The published LightningDiT: learning_rate 2e-4, b1 0.9, b2 0.95, eps 1e-8, weight_decay 0.01,
    none of vectors, clip_norm 1, momentum 0.95, 5 steps in bfloat16.
    """

    momentum: float  # beta
    ns_steps: int = at_most(100)  # Newton-Schulz steps
    # Of the matrices between and inside these steps: bfloat16, float32.
    ns_dtype: str
    # Of the AdamW group; configs of older runs lack it.
    vector_weight_decay: float = 0.0

    def rules(self) -> list[tuple[str, bool, str]]:
        return [
            *super().rules(),
            ("momentum", below_one(self.momentum), BELOW_ONE),
            ("ns_steps", self.ns_steps >= 1, "must be at least 1; the published Muon uses 5"),
            ("ns_dtype", self.ns_dtype in NS_DTYPES, f"must be one of {', '.join(NS_DTYPES)}"),
            ("vector_weight_decay", self.vector_weight_decay >= 0, "must not be negative"),
        ]


def newton_schulz(
    matrices: Float[Array, "*batch rows cols"], steps: int, dtype: str
) -> Float[Array, "*batch rows cols"]:
    """Nearly U V^T of each matrix U S V^T: singular values from about 0.7 to 1.2, zeros stay zero.

    A batch is one batched product, never a loop, so that a mesh can share it out. A matrix of
    m x n (m <= n) costs `steps` (4 m^2 n + 2 m^3) FLOPs.

    Args:
      matrices: any scale far above 1e-7 gives the same.
      dtype: what the products read, a name of `NS_DTYPES`; they and the sums accumulate in float32.
    """
    a, b, c = NS_COEFFICIENTS
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    tall = matrices.shape[-2] > matrices.shape[-1]

    def product(x: Array, y: Array) -> Array:
        return jnp.matmul(x, y, precision=precision, preferred_element_type=jnp.float32)

    x = (matrices.mT if tall else matrices).astype(dtype)
    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    x = (x / (norm + NS_EPS)).astype(dtype)
    for _ in range(steps):
        # Rounded once for both of its uses: then it is the Gram matrix of nearly the same x.
        gram = product(x, x.mT).astype(dtype)
        # The sums are float32: coefficients in bfloat16 would make another polynomial.
        factor = (b * gram.astype(jnp.float32) + c * product(gram, gram)).astype(dtype)
        x = (a * x.astype(jnp.float32) + product(factor, x)).astype(dtype)
    return (x.mT if tall else x).astype(matrices.dtype)


def newton_schulz_flops(params: Params, ns_steps: int) -> int:
    """FLOPs of all Newton-Schulz iterations of one update, whatever the batch size.

    With 5 steps: 17.8 TFLOP for SiT-XL/2 and for LightningDiT-XL/1, both with one readout, which is
    what forward and backward of about 25 images of 256 tokens cost.
    """
    total = 0
    for path, leaf in pytree.flatten(params).items():
        matrix = matrix_axes.matrix_of(path, leaf.shape)
        if matrix:
            m, n = sorted((matrix.rows, matrix.cols))
            total += prod(matrix.batch) * ns_steps * (4 * m**2 * n + 2 * m**3)
    return total


class MuonState(NamedTuple):
    momentum: Params  # of every matrix, in the shape of its leaf


def scale_by_muon(
    momentum: float, ns_steps: int, ns_dtype: str, share: Share = alone
) -> optax.GradientTransformation:
    """Gradients -> 0.2 sqrt(max(A, B)) u of the module's formula; every leaf must be a matrix."""

    def init(params: Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def mix(old: Params, new: Params) -> Params:
        return jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, old, new)

    def direction(path: str, leaf: Array) -> Array:
        def of_whole(leaf: Array) -> Array:
            matrix = matrix_axes.matrix_of(path, leaf.shape)
            return matrix.restore(newton_schulz(matrix.flatten(leaf), ns_steps, ns_dtype))

        matrix = matrix_axes.matrix_of(path, leaf.shape)
        scale = RMS * sqrt(max(matrix.published) * max(1, matrix.rows / matrix.cols))
        # Sent in the type of the iteration, to which it rounds anyway.
        return scale * share(path, leaf.astype(ns_dtype), of_whole).astype(leaf.dtype)

    def update(grads: Params, state: MuonState, params: Params | None = None):
        average = mix(state.momentum, grads)
        # Nesterov's look-ahead: the same mix once more.
        return pytree.map_named(direction, mix(average, grads)), MuonState(average)

    return optax.GradientTransformation(init, update)


def _scale_by_adamw(s: MuonSettings) -> optax.GradientTransformation:
    """Adam's direction plus the decay of vectors; its state is that of Adam alone.

    So a state does not depend on the decay: neither an older run's nor an imported one.
    """
    adam = optax.scale_by_adam(b1=s.b1, b2=s.b2, eps=s.eps)
    decay = optax.add_decayed_weights(s.vector_weight_decay)

    def update(grads: Params, state: optax.OptState, params: Params | None = None):
        direction, state = adam.update(grads, state, params)
        return decay.update(direction, optax.EmptyState(), params)[0], state

    return optax.GradientTransformation(adam.init, update)


def muon(s: MuonSettings, total_steps: int, share: Share = alone) -> optax.GradientTransformation:
    """Muon on the leaves that `matrix_axes.matrix_of` calls a matrix, AdamW on the rest.

    Each update costs `newton_schulz_flops` on top of the gradient, shared out over devices by
    `share`.
    """
    rate = schedules.learning_rate(s, total_steps)
    groups = {
        "muon": optax.chain(
            scale_by_muon(s.momentum, s.ns_steps, s.ns_dtype, share),
            optax.add_decayed_weights(s.weight_decay),
            optax.scale_by_learning_rate(rate),
        ),
        "adamw": optax.chain(_scale_by_adamw(s), optax.scale_by_learning_rate(rate)),
    }

    def labels(params: Params) -> Params:
        return pytree.map_named(
            lambda path, leaf: "muon" if matrix_axes.matrix_of(path, leaf.shape) else "adamw",
            params,
        )

    return trainable.trained_only(optax.partition(groups, labels), s.clip_norm)
