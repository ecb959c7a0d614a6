"""The MLP that a loss term trains on tokens, as a plain tree of kernels and biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ig_jax.models import layers
from ig_jax.types import Key, Params, Tokens


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
