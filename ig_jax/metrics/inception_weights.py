"""The published weights of the FID Inception network: their names, and how to fill them in.

A convolution is `<name>.conv.weight`, OIHW and without a bias, and a batch norm `<name>.bn`. With
its averages fixed, the norm is an affine map of each channel and becomes part of the convolution:

  scale = gamma / sqrt(variance + 0.001),   kernel = weight scale,   bias = beta - mean scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ig_jax import pytree
from ig_jax.metrics import inception_network, published_weights

_EPSILON = 1e-3
NORM = ("weight", "bias", "running_mean", "running_var")
# Counts the training steps of a norm. Files carry it or not; nothing depends on it.
COUNTER = ".num_batches_tracked"
# The logits of FID's network are without their bias, which files have all the same.
HEAD_BIAS = "fc.bias"
_WHOSE = (
    "of FID's Inception network, which has 1008 classes and no AuxLogits, unlike torchvision's own"
)


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published name and shape of every array that a file must hold."""
    for conv in inception_network.convolutions():
        yield f"{conv.name}.conv.weight", (conv.outputs, conv.inputs, *conv.window)
        yield from ((f"{conv.name}.bn.{part}", (conv.outputs,)) for part in NORM)
    features, classes = inception_network.HEAD
    yield "fc.weight", (classes, features)
    yield HEAD_BIAS, (classes,)


def from_published(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The weights for `inception_network.features`, float32 numpy arrays, from a state dict.

    Raises:
      ValueError: names are missing, left over, or of another shape; names the first of each.
    """
    state = {name: array for name, array in state.items() if not name.endswith(COUNTER)}
    published_weights.require(state, dict(_shapes()), _WHOSE)
    folded = {conv.name: _folded(state, conv.name) for conv in inception_network.convolutions()}
    head = {"kernel": np.array(state["fc.weight"].T, np.float32)}
    return pytree.unflatten({**folded, "fc": head})


def _folded(state: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """A convolution and its norm as one; in float64, so that folding rounds once."""
    gamma, beta, mean, variance = (
        np.asarray(state[f"{name}.bn.{part}"], np.float64) for part in NORM
    )
    scale = gamma / np.sqrt(variance + _EPSILON)
    kernel = np.asarray(state[f"{name}.conv.weight"], np.float64).transpose(2, 3, 1, 0)
    folded = {"kernel": kernel * scale, "bias": beta - mean * scale}
    return {part: array.astype(np.float32) for part, array in folded.items()}
