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

    def decode(self, x: Latents, weights: Params = NONE) -> Images:
        return to_uint8.false_colours(x)
