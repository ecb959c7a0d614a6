"""DINOv2's vision transformer with patches of 14 pixels (arXiv 2304.07193), as its class token.

  tokens = [class token, embedded patches] + position table
  tokens = tokens + scale_1 attention(norm(tokens)),  tokens + scale_2 mlp(norm(tokens))   (blocks)
  feature = norm(class token)

with 64 channels a head, biases everywhere, the exact GELU and layer norms of epsilon 1e-6. The
table was trained for images of 518 x 518; for others it is interpolated once, when weights are
read (`interpolate_positions`). Products run at the highest precision, as Inception's do.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ig_jax.types import Params, Tokens

PATCH = 14  # pixels of a side
HEAD_CHANNELS = 64
TRAINED_SIDE = 37  # patches of a side of the images that it was trained on
_EPSILON = 1e-6
# The published code adds it to the number of patches that it scales the table to, and so moves
# every position a little.
_OFFSET = 0.1


def class_token(weights: Params, x: Float[Array, "b s s 3"]) -> Float[Array, "b d"]:
    """The class token after the last norm, float32.

    Args:
      weights: as `dinov2.from_published` gives them, `positions` for images of s x s pixels.
      x: normalised images, float32; s a multiple of 14.
    """
    patches = _linear(weights["patch_embed"], _patches(x))
    first = jnp.broadcast_to(weights["cls_token"], (len(x), 1, patches.shape[-1]))
    tokens = jnp.concatenate([first, patches], axis=1) + weights["positions"][None]
    tokens, _ = lax.scan(lambda t, block: (_block(block, t), None), tokens, weights["blocks"])
    return _norm(weights["norm"], tokens[:, 0])


def interpolate_positions(
    table: Float[np.ndarray, "n d"], side: int
) -> Float[np.ndarray, "side*side d"]:
    """A square table of positions for side x side patches, by cubic convolution (a = -3/4).

    Row i of the new table lies at (i + 1/2) m / (side + 0.1) - 1/2 of the old one of m x m.
    """
    trained = math.isqrt(len(table))
    if side == trained:
        return table
    along = _cubic(trained, side)
    square = table.reshape(trained, trained, -1).astype(np.float64)
    new = np.einsum("iy,jx,yxd->ijd", along, along, square, optimize=True)
    return new.reshape(side * side, -1).astype(np.float32)


def _cubic(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """Weights of the old positions for each of the new; beyond the border stands the last one."""
    at = (np.arange(after) + 0.5) * before / (after + _OFFSET) - 0.5
    first = np.floor(at).astype(int) - 1
    weights = np.zeros((after, before))
    for k in range(4):
        distance = np.abs(at - (first + k))
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        share = np.where(distance <= 1, near, far)
        np.add.at(weights, (np.arange(after), np.clip(first + k, 0, before - 1)), share)
    return weights


def _patches(x: Float[Array, "b s s 3"]) -> Float[Array, "b n p"]:
    """Patches row by row, the values of each in the order of the published kernel [3, 14, 14]."""
    b, side = len(x), x.shape[1] // PATCH
    cut = x.reshape(b, side, PATCH, side, PATCH, 3)
    return cut.transpose(0, 1, 3, 5, 2, 4).reshape(b, side * side, 3 * PATCH * PATCH)


def _block(block: Params, tokens: Tokens) -> Tokens:
    mixed = _attention(block["attn"], _norm(block["norm1"], tokens))
    tokens += _of_channels(block["ls1"], mixed) * mixed
    hidden = jax.nn.gelu(_linear(block["mlp"]["fc1"], _norm(block["norm2"], tokens)), False)
    added = _linear(block["mlp"]["fc2"], hidden)
    return tokens + _of_channels(block["ls2"], added) * added


def _attention(weights: Params, tokens: Tokens) -> Tokens:
    b, n, d = tokens.shape
    qkv = _linear(weights["qkv"], tokens).reshape(b, n, 3, d // HEAD_CHANNELS, HEAD_CHANNELS)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    highest = lax.Precision.HIGHEST
    scores = jnp.einsum("bnhc,bmhc->bhnm", q, k, precision=highest) * HEAD_CHANNELS**-0.5
    mixed = jnp.einsum("bhnm,bmhc->bnhc", jax.nn.softmax(scores), v, precision=highest)
    return _linear(weights["proj"], mixed.reshape(b, n, d))


def _linear(layer: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    y = jnp.matmul(x, layer["kernel"], precision=lax.Precision.HIGHEST)
    return y + _of_channels(layer["bias"], y)


def _norm(layer: Params, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    scale, bias = (_of_channels(layer[name], x) for name in ("scale", "bias"))
    return centred * lax.rsqrt(variance + _EPSILON) * scale + bias


def _of_channels(vector: Float[Array, "d"], x: Float[Array, "*b d"]) -> Float[Array, "*1 d"]:
    """With as many axes as x."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))
