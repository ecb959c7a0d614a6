"""Embeddings of latents, times and labels as tokens and a conditioning vector, and tokens back.

Conventions of the published checkpoints (SiT, DiT and LightningDiT share them):
  - patches are a p x p convolution of stride p; tokens run row-major over the patch grid;
  - the fixed table's first half of the channels encodes the *column*, the second half the
    row, each a
    block of sines then a block of cosines;
  - the time features are a block of cosines then a block of sines, of t as it is (not times 1000);
  - a token unfolds to (row in patch, column in patch, channel), channel fastest.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ig_jax.models import axes, layers
from ig_jax.models.axes import CLASSES, CONDITION, EMBED, WINDOW
from ig_jax.types import Latents, Tokens

NUM_TIME_FEATURES = 256
MAX_PERIOD = 10_000.0


def time_features(t: Float[Array, "b *g"], dim: int = NUM_TIME_FEATURES) -> Float[Array, "b *g f"]:
    """[cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / (dim/2)), float32."""
    per_time = frequencies(dim // 2).reshape(*(1,) * t.ndim, -1)
    angles = t.astype(jnp.float32)[..., None] * per_time
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def frequencies(half: int) -> np.ndarray:
    """f_i of `time_features`, float32 [half], as rounded by the published code.

    At t = 999 one last place of a frequency moves a feature by 6e-5. The published code rounds the
    exponent to float32, which moves f_i by up to 6e-7 of itself, and its exponential is as good as
    exact; exponentials of XLA are not, and differ between devices. So this is made on the host.
    """
    exponents = np.float32(-math.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32)
    return np.exp((exponents / np.float32(half)).astype(np.float64)).astype(np.float32)


def position_table(grid_side: int, dim: int) -> np.ndarray:
    """Fixed 2-D sine-cosine table [1, grid_side**2, dim], float32 (computed in float64)."""
    frequencies = MAX_PERIOD ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    angles = np.arange(grid_side)[:, None] * frequencies[None]
    encoded = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    columns, rows = np.tile(encoded, (grid_side, 1)), np.repeat(encoded, grid_side, axis=0)
    return np.concatenate([columns, rows], axis=1)[None]


def patch_side(side: int, tokens: int) -> int:
    """Side of a patch of latents [side, side, c] that are so many tokens."""
    return side // math.isqrt(tokens)


class PatchEmbed(nnx.Module):
    """Latents [b, h, w, c] -> tokens [b, (h/p)(w/p), hidden_size]."""

    def __init__(self, channels: int, hidden_size: int, patch: int, *, dtype, rngs: nnx.Rngs):
        self.proj = nnx.Conv(
            channels,
            hidden_size,
            kernel_size=(patch, patch),
            strides=patch,
            padding="VALID",
            kernel_init=layers.xavier_flat,
            dtype=dtype,
            rngs=rngs,
            **axes.linear_metadata((*WINDOW, "channels"), (EMBED,)),
        )

    def __call__(self, x: Latents) -> Tokens:
        x = self.proj(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class TimeEmbed(nnx.Module):
    """Time -> vector, in float32 whatever the compute type: t near 0 and 1 must stay distinct.

    `scale` multiplies t first. The published models use 1; t in [0, 1] then leaves most features
    nearly constant, which a small network learns from much later.
    """

    def __init__(self, hidden_size: int, *, scale: float, rngs: nnx.Rngs):
        self.scale = scale
        kinds = {"kernel_init": layers.normal_002, "rngs": rngs}
        self.fc1 = nnx.Linear(
            NUM_TIME_FEATURES,
            hidden_size,
            **kinds,
            **axes.linear_metadata((axes.TIME_FEATURES,), (CONDITION,)),
        )
        self.fc2 = nnx.Linear(
            hidden_size, hidden_size, **kinds, **axes.linear_metadata((CONDITION,), (CONDITION,))
        )

    def __call__(self, t: Float[Array, "b *g"]) -> Float[Array, "b *g d"]:
        return self.fc2(nnx.silu(self.fc1(time_features(t * self.scale))))


class LabelEmbed(nnx.Module):
    """Table of num_classes + 1 rows; the last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.table = nnx.Embed(
            num_classes + 1,
            hidden_size,
            embedding_init=layers.normal_002,
            embedding_metadata=axes.axis_metadata(CLASSES, CONDITION),
            rngs=rngs,
        )

    def __call__(self, y: Int[Array, "b *g"]) -> Float[Array, "b *g d"]:
        return self.table(y)


def unpatchify(tokens: Float[Array, "b n f"], patch: int) -> Latents:
    """Tokens [b, n, p*p*c] of a square grid -> latents [b, h, w, c]."""
    b, n, features = tokens.shape
    side, channels = round(n**0.5), features // patch**2
    x = tokens.reshape(b, side, side, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, side * patch, side * patch, channels)


def patchify(x: Latents, patch: int) -> Float[Array, "b n f"]:
    """The inverse of `unpatchify`: latents [b, h, w, c] -> tokens [b, n, p*p*c]."""
    b, height, width, channels = x.shape
    rows, columns = height // patch, width // patch
    x = x.reshape(b, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, patch**2 * channels)
