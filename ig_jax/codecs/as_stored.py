"""Latents as they are stored, without the autoencoder that would turn them into images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Bool

from ig_jax.codecs import to_uint8
from ig_jax.codecs.base import WithoutWeights, mirror
from ig_jax.types import NONE, Images, Key, Latents, Params


@dataclass(frozen=True)
class AsStored(WithoutWeights):
    """Stored float32 [b, h, w, c] are the latents."""

    rounding: ClassVar[str] = "false colours"

    def latent_shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        return stored_shape

    def latent(
        self,
        stored: Array,
        key: Key,
        weights: Params = NONE,
        mirrored: Bool[Array, "b"] | None = None,
    ) -> Latents:
        return mirror(stored, mirrored)

    def can_mirror(self, stored_shape: tuple[int, ...]) -> bool:
        return True

    def mirrored(self, stored: Array, key: Key, weights: Params = NONE) -> Latents:
        """The latents themselves turned about: these are made up, and no image is behind them."""
        return stored[:, :, ::-1]

    def decode(self, x: Latents, weights: Params = NONE) -> Images:
        return to_uint8.false_colours(x)
