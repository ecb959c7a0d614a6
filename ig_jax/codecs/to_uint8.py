"""From what a decoder gives, in [-1, 1], to 8 bits: the two rules behind published numbers.

They are half a grey level apart, so nearly half of all values differ by one: use the rule of the
model whose numbers are to be met. Both end in a cut of the fraction, which is what `astype` does.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ig_jax.types import Images, Latents

TRUNCATED, ROUNDED = "255 (x + 1) / 2, cut", "127.5 x + 128, cut"  # as results name them


def to_uint8_truncated(x: Float[Array, "b H W C"]) -> Images:
    """clip(255 (x + 1) / 2), fraction cut: images of SiT + IG (SiT/generate.py), REPA and SRA."""
    return jnp.clip(255 * ((x + 1) / 2), 0, 255).astype(jnp.uint8)


def to_uint8_rounded(x: Float[Array, "b H W C"]) -> Images:
    """clip(127.5 x + 128), fraction cut: rounds half up. Images of LightningDiT, DiT and SiT."""
    return jnp.clip(127.5 * x + 128, 0, 255).astype(jnp.uint8)


ROUNDING_RULES = {TRUNCATED: to_uint8_truncated, ROUNDED: to_uint8_rounded}


def false_colours(x: Latents) -> Images:
    """Latents without their decoder: the first three channels (or the first), [-2, 2] -> 0..255."""
    shown = x[..., :3] if x.shape[-1] >= 3 else x[..., :1]
    return jnp.clip(64 * shown + 128, 0, 255).astype(jnp.uint8)
