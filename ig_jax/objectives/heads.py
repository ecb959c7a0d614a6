"""The MLPs that loss terms train, as plain trees of kernels, biases and scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ig_jax.models import layers
from ig_jax.types import BatchRows, Key, Params, Tokens

NORMS = ("batch", "layer")  # of `apply_normalized_mlp`
_EPSILON = 1e-5  # of PyTorch's norms


def init_mlp(key: Key, widths: Sequence[int]) -> Params:
    """Xavier-uniform kernels and zero biases, as a network's blocks begin; float32.

    Args:
      widths: of the input, of each hidden layer, of the output.

    Returns:
      {'fc1': {'kernel': [in, out], 'bias': [out]}, 'fc2': ...}.
    """
    keys = jax.random.split(key, len(widths) - 1)
    return {
        f"fc{i}": {
            "kernel": layers.xavier(keys[i - 1], (widths[i - 1], widths[i]), jnp.float32),
            "bias": jnp.zeros(widths[i], jnp.float32),
        }
        for i in range(1, len(widths))
    }


def apply_mlp(head: Params, tokens: Tokens, dtype: Any) -> Float[Array, "b n f"]:
    """The MLP with SiLU between its layers; products as `dtype`, the result as `tokens` are."""
    x = tokens
    for i in range(1, len(head) + 1):
        kernel, bias = (head[f"fc{i}"][name].astype(dtype) for name in ("kernel", "bias"))
        x = (jax.nn.silu(x) if i > 1 else x.astype(dtype)) @ kernel + bias[None, None]
    return x.astype(tokens.dtype)


def init_normalized_mlp(key: Key, widths: Sequence[int]) -> Params:
    """Xavier-uniform kernels, and scales 1 and biases 0 of the norms between layers; float32.

    Args:
      widths: of the input, of each hidden layer, of the output.

    Returns:
      {'fc1': {'kernel': [in, out]}, 'norm1': {'scale': [out], 'bias': [out]}, 'fc2': ...}, without
      a norm behind the last layer, which has no parameters.
    """
    head: dict[str, Any] = {}
    for i, layer in enumerate(init_mlp(key, widths).values(), start=1):
        head[f"fc{i}"] = {"kernel": layer["kernel"]}
        if i < len(widths) - 1:
            width = widths[i]
            head[f"norm{i}"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    return head


def apply_normalized_mlp(
    head: Params, x: Float[Array, "b d"], *, norm: str, rows: BatchRows, dtype: Any
) -> Float[Array, "b f"]:
    """The MLP with a norm behind each layer, and ReLU between them.

    Args:
      head: as `init_normalized_mlp` makes it.
      x: a vector for each image.
      norm: `batch`, of each value over all images of the batch; `layer`, over an image's values.
      rows: reads the images that are on other devices.
      dtype: of the products; all else is float32.
    """
    layers = sum(name.startswith("fc") for name in head)
    for i in range(1, layers + 1):
        kernel = head[f"fc{i}"]["kernel"]
        x = (x.astype(dtype) @ kernel.astype(dtype)).astype(jnp.float32)
        x = batch_norm(x, rows) if norm == "batch" else layer_norm(x, epsilon=_EPSILON)
        if i < layers:
            affine = head[f"norm{i}"]
            x = jax.nn.relu(x * affine["scale"][None] + affine["bias"][None])
    return x


def batch_norm(x: Float[Array, "b f"], rows: BatchRows) -> Float[Array, "b f"]:
    """(x - mean) / sqrt(variance + 1e-5) over all images of the batch, on whatever devices."""
    x = x - rows.mean(x)[None]
    return x * jax.lax.rsqrt(rows.mean(x**2) + _EPSILON)[None]


def layer_norm(x: Float[Array, "... d"], *, epsilon: float) -> Float[Array, "... d"]:
    """(x - mean) / sqrt(variance + epsilon) over the last axis."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)
