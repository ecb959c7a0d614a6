"""The convolutional autoencoder with a Gaussian posterior of latent diffusion (arXiv 2112.10752).

Pure functions of a nested dict of arrays, which `kl_names` describes and fills; its structure says
how many levels, blocks and attentions there are. Images and latents are channels last. Levels
halve or double the side; both `down` and `up` are numbered in the order in which they run.

Convolutions and matrix products run in the type asked for; norms, softmax and the posterior in
float32. Group norms have epsilon 1e-6 and, in all published weights, 32 groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ig_jax.codecs.base import in_parts
from ig_jax.types import Latents, Params

_EPSILON = 1e-6
GROUPS = 32
LOGVAR_RANGE = (-30.0, 20.0)
# Pixels on each device that are worked on together. At full resolution the network keeps a few
# arrays of 128 to 256 channels: 16 images of 256 pixels take just under 4 GiB in float32.
AT_ONCE = 16 * 256**2
# The reference pads right and bottom only; "SAME" would do so too at even sides, unlike padding 1.
AFTER = ((0, 1), (0, 1))

_Maps = Float[Array, "b _ _ _"]  # [batch, height, width, channels]


@dataclass(frozen=True)
class Numerics:
    """Constants that the shapes of the parameters do not give."""

    groups: int  # of every group norm
    dtype: DTypeLike  # of convolutions and matrix products


def group_norm(params: Params, x: _Maps, how: Numerics) -> _Maps:
    """Mean 0 and variance 1 over pixels and the channels of a group, then affine; float32.

    Raises:
      ValueError: the channels cannot be cut into that many groups.
    """
    b, h, w, c = x.shape
    if c % how.groups:
        raise ValueError(f"groups = {how.groups}: must divide the {c} channels of every norm")
    x = x.astype(jnp.float32).reshape(b, h, w, how.groups, -1)
    centred = x - x.mean((1, 2, 4), keepdims=True)
    variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
    normed = (centred * jax.lax.rsqrt(variance + _EPSILON)).reshape(b, h, w, c)
    return normed * _per_channel(params["scale"]) + _per_channel(params["bias"])


def _per_channel(vector: Array, dtype: DTypeLike = jnp.float32) -> Float[Array, "1 1 1 c"]:
    return jnp.asarray(vector, dtype).reshape(1, 1, 1, -1)


def swish_norm(params: Params, x: _Maps, how: Numerics) -> _Maps:
    """x sigmoid(x) of the normed input."""
    return jax.nn.silu(group_norm(params, x, how))


def conv(
    params: Params, x: _Maps, how: Numerics, *, stride: int = 1, padding: Any = "SAME"
) -> _Maps:
    """Convolution with a kernel [h, w, in, out] and a bias."""
    out = jax.lax.conv_general_dilated(
        jnp.asarray(x, how.dtype),
        jnp.asarray(params["kernel"], how.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return out + _per_channel(params["bias"], how.dtype)


def linear(params: Params, x: _Maps, how: Numerics) -> _Maps:
    """x @ kernel + bias at every pixel."""
    out = jnp.asarray(x, how.dtype) @ jnp.asarray(params["kernel"], how.dtype)
    return out + _per_channel(params["bias"], how.dtype)


def residual_block(params: Params, x: _Maps, how: Numerics) -> _Maps:
    """x + conv(swish(norm(conv(swish(norm(x)))))); a 1x1 shortcut where the width changes."""
    h = conv(params["conv1"], swish_norm(params["norm1"], x, how), how)
    h = conv(params["conv2"], swish_norm(params["norm2"], h, how), how)
    return h + (conv(params["shortcut"], x, how) if "shortcut" in params else x)


def attention(params: Params, x: _Maps, how: Numerics) -> _Maps:
    """x + self-attention between all pixels with one head, logits scaled by c^-1/2."""
    b, h, w, c = x.shape
    normed = group_norm(params["norm"], x, how)
    q, k, v = (linear(params[n], normed, how).reshape(b, h * w, 1, c) for n in ("q", "k", "v"))
    mixed = jax.nn.dot_product_attention(q, k, v, implementation="xla").reshape(x.shape)
    return x + linear(params["proj_out"], mixed, how)


def downsample(params: Params, x: _Maps, how: Numerics) -> _Maps:
    """Half the side."""
    return conv(params, x, how, stride=2, padding=AFTER)


def upsample(params: Params, x: _Maps, how: Numerics) -> _Maps:
    """Twice the side: every pixel four times, then a convolution."""
    return conv(params, x.repeat(2, axis=1).repeat(2, axis=2), how)


def _in_order(numbered: Mapping[str, Any]) -> list[Any]:
    return [numbered[str(i)] for i in range(len(numbered))]


def _level(params: Params, x: _Maps, how: Numerics) -> _Maps:
    """The blocks of one level, each followed by its attention where the level has any."""
    blocks = _in_order(params["block"])
    attentions = _in_order(params["attn"]) if "attn" in params else [None] * len(blocks)
    for block, after in zip(blocks, attentions, strict=True):
        x = residual_block(block, x, how)
        if after is not None:
            x = attention(after, x, how)
    return x


def _middle(params: Params, x: _Maps, how: Numerics) -> _Maps:
    x = residual_block(params["block_1"], x, how)
    x = attention(params["attn_1"], x, how)
    return residual_block(params["block_2"], x, how)


def encoder(params: Params, images: Float[Array, "b H W 3"], how: Numerics) -> _Maps:
    """Images -> [b, h, w, 2c], before the 1x1 convolution that gives the posterior."""
    x = conv(params["conv_in"], images, how)
    for level in _in_order(params["down"]):
        x = _level(level, x, how)
        if "downsample" in level:
            x = downsample(level["downsample"], x, how)
    x = _middle(params["mid"], x, how)
    return conv(params["conv_out"], swish_norm(params["norm_out"], x, how), how)


def decoder(params: Params, x: Latents, how: Numerics) -> Float[Array, "b H W 3"]:
    """Maps the output of the 1x1 convolution over latents to images."""
    x = _middle(params["mid"], conv(params["conv_in"], x, how), how)
    for level in _in_order(params["up"]):
        x = _level(level, x, how)
        if "upsample" in level:
            x = upsample(level["upsample"], x, how)
    return conv(params["conv_out"], swish_norm(params["norm_out"], x, how), how)


def posterior(moments: Float[Array, "b h w _"]) -> tuple[Latents, Latents]:
    """(mean, std), float32, from mean and log variance side by side."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))


def encode(
    params: Params,
    images: Float[Array, "b H W 3"],
    *,
    groups: int = GROUPS,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Latents, Latents]:
    """Images in [-1, 1] -> (mean, std) of their latents [b, H/f, W/f, c], float32, unscaled.

    Args:
      groups: of every group norm; 32 in all published weights.
      dtype: of convolutions and matrix products.

    Raises:
      ValueError: the sides are no multiples of f = 2^(levels - 1), or `groups` does not fit.
    """
    factor = 2 ** (len(params["encoder"]["down"]) - 1)
    if images.shape[1] % factor or images.shape[2] % factor:
        raise ValueError(
            f"images are {images.shape[1]} x {images.shape[2]}: both sides must be multiples of "
            f"{factor}, the factor of this autoencoder; crop or resize them"
        )
    how = Numerics(groups, dtype)

    def moments(images: Float[Array, "b H W 3"]) -> _Maps:
        return conv(params["quant_conv"], encoder(params["encoder"], images, how), how)

    height, width = images.shape[1:3]
    return posterior(in_parts(moments, images, _at_once(height * width)))


def decode(
    params: Params, latents: Latents, *, groups: int = GROUPS, dtype: DTypeLike = jnp.float32
) -> Float[Array, "b H W 3"]:
    """Unscaled latents [b, h, w, c] -> images [b, fh, fw, 3], about [-1, 1], float32.

    Not clipped: that belongs to the 8-bit rules of `pixels`. Arguments as in `encode`.
    """
    how = Numerics(groups, dtype)

    def images(latents: Latents) -> Float[Array, "b H W 3"]:
        x = conv(params["post_quant_conv"], latents, how)
        return decoder(params["decoder"], x, how).astype(jnp.float32)

    height, width = latents.shape[1:3]
    factor = 2 ** (len(params["decoder"]["up"]) - 1)
    return in_parts(images, latents, _at_once(height * width * factor**2))


def _at_once(pixels: int) -> int:
    """Number of images of so many pixels each that go through the network together."""
    return max(1, AT_ONCE // pixels)
