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
    return dot / (_norm(a, axis) * _norm(b, axis))


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """The vector of length 1 in the same direction, over the last axis; 0 for 0."""
    return x / _norm(x, -1)[..., None]


def _norm(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    # Bounded before the root: at zero the gradient of a norm is not a number.
    return jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=axis), SMALLEST_NORM**2))


def smooth_l1(error: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """error^2 / (2 beta) where |error| < beta, else |error| - beta / 2."""
    size = jnp.abs(error)
    return jnp.where(size < beta, error**2 / (2 * beta), size - beta / 2)
