"""Parts of codecs: without weights, mirror images, and batches processed in parts."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from ig_jax import pytree
from ig_jax.types import Key, Params


class WithoutWeights:
    """A codec that needs no weights, neither way."""

    def encoder_weights(self, stored_shape: tuple[int, ...]) -> Params:
        return {}

    def decoder_weights(self) -> Params:
        return {}

    def turned(self, key: Key, rows: int) -> Bool[Array, "b"]:
        return jnp.zeros(rows, bool)


def mirror(stored: Array, mirrored: Bool[Array, "b"] | None) -> Array:
    """Examples [b, h, w, c], those of `mirrored` turned left to right; None turns none."""
    if mirrored is None:
        return stored
    return jnp.where(mirrored[:, None, None, None], stored[:, :, ::-1], stored)


def in_parts(function: Callable[[jax.Array], jax.Array], x: jax.Array, most: int) -> jax.Array:
    """`function(x)` on at most `most` rows [b, ...] at a time on each device, to bound memory.

    `function` must treat rows alone, as it is also given rows of zeros.
    """
    rows = len(x)
    parts = -(-rows // (most * jax.device_count()))
    if parts == 1:
        return function(x)
    padded = jnp.pad(x, [(0, -rows % parts)] + [(0, 0)] * (x.ndim - 1))
    out = lax.map(function, pytree.cut(padded, parts))
    return pytree.joined(out)[:rows]
