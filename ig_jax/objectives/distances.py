"""Distances and similarities of predictions and of tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST_NORM = 1e-8  # as published; a prediction that starts at zero then has a huge gradient,
# which clipping brings to its direction


def similarity(
    a: Float[Array, "..."], b: Float[Array, "..."], axis: int = -1
) -> Float[Array, "..."]:
    """Cosine of the angle between a and b, over an axis."""
    dot = jnp.sum(a * b, axis=axis)
    # Bounded before the root: at zero the gradient of a norm is not a number.
    squares = [jnp.sum(x**2, axis=axis) for x in (a, b)]
    norms = [jnp.sqrt(jnp.maximum(s, SMALLEST_NORM**2)) for s in squares]
    return dot / (norms[0] * norms[1])


def smooth_l1(error: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """error^2 / (2 beta) where |error| < beta, else |error| - beta / 2."""
    size = jnp.abs(error)
    return jnp.where(size < beta, error**2 / (2 * beta), size - beta / 2)
