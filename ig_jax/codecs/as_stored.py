"""Latents as they are stored, without the autoencoder that would turn them into pictures."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from ig_jax.types import NONE, Images, Key, Latents, Params


@dataclass(frozen=True)
class AsStored:
    """Stored float32 [b, h, w, c] are the latents."""

    def latent_shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        return stored_shape

    def latent(self, stored: Array, key: Key) -> Latents:
        return stored

    def weights(self) -> Params:
        return {}

    def decode(self, x: Latents, weights: Params = NONE) -> Images:
        """The first three channels (or the first) in false colours: [-2, 2] becomes 0..255."""
        shown = x[..., :3] if x.shape[-1] >= 3 else x[..., :1]
        return jnp.clip(64 * shown + 128, 0, 255).astype(jnp.uint8)
