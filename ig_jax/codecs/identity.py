"""Pixels as they are: the latent is the image itself, scaled to [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ig_jax.codecs import to_uint8
from ig_jax.codecs.base import WithoutWeights, mirror
from ig_jax.types import NONE, Images, Key, Latents, Params


@dataclass(frozen=True)
class Identity(WithoutWeights):
    """Stored uint8 [b, h, w, c] <-> latents x / 127.5 - 1 of the same shape."""

    rounding: ClassVar[str] = to_uint8.ROUNDED

    def latent_shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        return stored_shape

    def latent(
        self,
        stored: Array,
        key: Key,
        weights: Params = NONE,
        mirrored: Bool[Array, "b"] | None = None,
    ) -> Latents:
        return mirror(stored, mirrored).astype(jnp.float32) / 127.5 - 1

    def decode(self, x: Latents, weights: Params = NONE) -> Images:
        """Clamped and rounded half up, the inverse of `latent` on 8-bit images."""
        return to_uint8.to_uint8_rounded(x)
