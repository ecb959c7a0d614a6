"""The Inception network of December 2015, on whose features FID is defined, as a table.

It is Inception v3 (arXiv 1512.00567) with 1008 classes and no auxiliary head. Three things differ
from the network of that name in today's libraries, and move the features:

  average pools divide by the pixels under the window, at the border fewer than 9
  the last block pools by maximum, not by average
  the logits are without their bias

Names are those of the published PyTorch conversion; maps are float32 and channels last. Batch
norms are part of the convolutions already (`inception_weights`). Products run at the highest
precision: a TPU would otherwise round their factors to bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ig_jax.metrics.feature_space import Features
from ig_jax.types import Params

_Maps = Float[Array, "b _ _ _"]  # [batch, height, width, channels]

HEAD = (2048, 1008)  # features, classes
SPATIAL_CHANNELS = 7  # of 768: 17 x 17 x 7 = 2023 numbers, about as many as are pooled


@dataclass(frozen=True)
class Conv:
    """A convolution with bias, and a ReLU."""

    name: str
    inputs: int
    outputs: int
    window: tuple[int, int] = (1, 1)  # height, width
    stride: int = 1
    padding: str = "SAME"


@dataclass(frozen=True)
class Fork:
    """Chains side by side; their outputs are joined along the channels, in this order."""

    branches: tuple[Chain, ...]
    name: str = ""  # of a block, under which its weights lie


Pool = Callable[[_Maps], _Maps]
Chain = tuple[Conv | Fork | Pool, ...]  # one after the other


def _max_pool(x: _Maps, stride: int, padding: str) -> _Maps:
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def max_pool(x: _Maps) -> _Maps:
    return _max_pool(x, 1, "SAME")


def max_pool_halving(x: _Maps) -> _Maps:
    return _max_pool(x, 2, "VALID")


def average_pool(x: _Maps) -> _Maps:
    """Of the pixels under the 3 x 3 window; the padding does not count."""
    sums = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    rows, columns = (np.convolve(np.ones(side), np.ones(3), "same") for side in x.shape[1:3])
    return sums / np.outer(rows, columns).astype(np.float32)[None, :, :, None]


def _mixed_5(name: str, inputs: int, pooled: int) -> Fork:
    return Fork(
        name=name,
        branches=(
            (Conv("branch1x1", inputs, 64),),
            (Conv("branch5x5_1", inputs, 48), Conv("branch5x5_2", 48, 64, (5, 5))),
            (
                Conv("branch3x3dbl_1", inputs, 64),
                Conv("branch3x3dbl_2", 64, 96, (3, 3)),
                Conv("branch3x3dbl_3", 96, 96, (3, 3)),
            ),
            (average_pool, Conv("branch_pool", inputs, pooled)),
        ),
    )


def _mixed_6(name: str, width: int) -> Fork:
    return Fork(
        name=name,
        branches=(
            (Conv("branch1x1", 768, 192),),
            (
                Conv("branch7x7_1", 768, width),
                Conv("branch7x7_2", width, width, (1, 7)),
                Conv("branch7x7_3", width, 192, (7, 1)),
            ),
            (
                Conv("branch7x7dbl_1", 768, width),
                Conv("branch7x7dbl_2", width, width, (7, 1)),
                Conv("branch7x7dbl_3", width, width, (1, 7)),
                Conv("branch7x7dbl_4", width, width, (7, 1)),
                Conv("branch7x7dbl_5", width, 192, (1, 7)),
            ),
            (average_pool, Conv("branch_pool", 768, 192)),
        ),
    )


def _mixed_7(name: str, inputs: int, pool: Pool) -> Fork:
    def crossed(wide: str, high: str) -> Fork:
        return Fork(((Conv(wide, 384, 384, (1, 3)),), (Conv(high, 384, 384, (3, 1)),)))

    return Fork(
        name=name,
        branches=(
            (Conv("branch1x1", inputs, 320),),
            (Conv("branch3x3_1", inputs, 384), crossed("branch3x3_2a", "branch3x3_2b")),
            (
                Conv("branch3x3dbl_1", inputs, 448),
                Conv("branch3x3dbl_2", 448, 384, (3, 3)),
                crossed("branch3x3dbl_3a", "branch3x3dbl_3b"),
            ),
            (pool, Conv("branch_pool", inputs, 192)),
        ),
    )


MIXED_6A = Fork(
    name="Mixed_6a",
    branches=(
        (Conv("branch3x3", 288, 384, (3, 3), 2, "VALID"),),
        (
            Conv("branch3x3dbl_1", 288, 64),
            Conv("branch3x3dbl_2", 64, 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, 96, (3, 3), 2, "VALID"),
        ),
        (max_pool_halving,),
    ),
)

MIXED_7A = Fork(
    name="Mixed_7a",
    branches=(
        (Conv("branch3x3_1", 768, 192), Conv("branch3x3_2", 192, 320, (3, 3), 2, "VALID")),
        (
            Conv("branch7x7x3_1", 768, 192),
            Conv("branch7x7x3_2", 192, 192, (1, 7)),
            Conv("branch7x7x3_3", 192, 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 192, (3, 3), 2, "VALID"),
        ),
        (max_pool_halving,),
    ),
)

TO_SPATIAL: Chain = (  # its output's first channels are the spatial features
    Conv("Conv2d_1a_3x3", 3, 32, (3, 3), 2, "VALID"),  # 299 -> 149
    Conv("Conv2d_2a_3x3", 32, 32, (3, 3), 1, "VALID"),  # -> 147
    Conv("Conv2d_2b_3x3", 32, 64, (3, 3)),
    max_pool_halving,  # -> 73
    Conv("Conv2d_3b_1x1", 64, 80),
    Conv("Conv2d_4a_3x3", 80, 192, (3, 3), 1, "VALID"),  # -> 71
    max_pool_halving,  # -> 35
    _mixed_5("Mixed_5b", 192, pooled=32),
    _mixed_5("Mixed_5c", 256, pooled=64),
    _mixed_5("Mixed_5d", 288, pooled=64),
    MIXED_6A,  # -> 17
    _mixed_6("Mixed_6b", 128),
    _mixed_6("Mixed_6c", 160),
    _mixed_6("Mixed_6d", 160),
)
TO_POOL: Chain = (
    _mixed_6("Mixed_6e", 192),
    MIXED_7A,  # -> 8
    _mixed_7("Mixed_7b", 1280, average_pool),
    _mixed_7("Mixed_7c", 2048, max_pool),
)


def convolutions(chain: Chain = TO_SPATIAL + TO_POOL, within: str = "") -> Iterator[Conv]:
    """All convolutions, under their dotted names."""
    for step in chain:
        if isinstance(step, Conv):
            yield replace(step, name=within + step.name)
        elif isinstance(step, Fork):
            for branch in step.branches:
                yield from convolutions(branch, within + (f"{step.name}." if step.name else ""))


def _conv(conv: Conv, weights: Params, x: _Maps) -> _Maps:
    out = lax.conv_general_dilated(
        x,
        weights["kernel"],
        (conv.stride, conv.stride),
        conv.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    return jax.nn.relu(out + weights["bias"].reshape(1, 1, 1, -1))


def apply_network(chain: Chain, weights: Params, x: _Maps) -> _Maps:
    """The steps of the chain in turn."""
    for step in chain:
        if isinstance(step, Conv):
            x = _conv(step, weights[step.name], x)
        elif isinstance(step, Fork):
            inside = weights[step.name] if step.name else weights
            x = jnp.concatenate(
                [apply_network(branch, inside, x) for branch in step.branches], axis=-1
            )
        else:
            x = step(x)
    return x


def features(weights: Params, x: Float[Array, "b 299 299 3"]) -> Features:
    """Features of images in [-1, 1): `pool` [b, 2048], `logits` [b, 1008], `spatial` [b, 2023].

    `spatial` holds pixel after pixel, row by row, and of each the first channels.
    """
    maps = apply_network(TO_SPATIAL, weights, x)
    spatial = maps[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    pool = apply_network(TO_POOL, weights, maps).mean((1, 2))
    logits = jnp.matmul(pool, weights["fc"]["kernel"], precision=lax.Precision.HIGHEST)
    return Features(pool, logits, spatial)
