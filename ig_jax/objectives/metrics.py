"""Losses by bucket of diffusion time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ig_jax.types import PerExample, PerToken, Times

# Losses are logged by time as well: a mean hides that most of it comes from one end.
TIME_BUCKETS = 10


BY_TIME = "by_time/"


def sum_by_time(values: PerExample | PerToken, t: Times | Float[Array, "b n"]) -> Float[Array, "k"]:
    """Sums of `values` with t in [i, i + 1) / TIME_BUCKETS; t = 1 in the last.

    Args:
      values: of examples or tokens.
      t: of examples, or of all tokens, each of which then has its example's value if it has none.
    """
    if values.ndim < t.ndim:
        values = jnp.broadcast_to(values[:, None], t.shape)
    bucket = jnp.clip((t * TIME_BUCKETS).astype(jnp.int32), 0, TIME_BUCKETS - 1)
    return jnp.zeros(TIME_BUCKETS, values.dtype).at[bucket].add(jax.lax.stop_gradient(values))


def mean_by_time(sums: Mapping[str, Any]) -> dict[str, float]:
    """{'loss_by_time/<term>/0.3': mean loss at t in [0.3, 0.4), ...} without the empty buckets.

    Args:
      sums: the 'by_time/...' metrics, summed over any number of steps.
    """
    examples = sums[f"{BY_TIME}examples"]
    return {
        f"loss_by_time/{name.removeprefix(BY_TIME)}/{i / TIME_BUCKETS:.1f}": float(total / count)
        for name, totals in sums.items()
        if name != f"{BY_TIME}examples"
        for i, (total, count) in enumerate(zip(totals, examples, strict=True))
        if count
    }
