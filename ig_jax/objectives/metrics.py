"""Metrics of a training step as totals and counts, and losses by bucket of diffusion time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from ig_jax.types import Abstract, PerExample, PerToken, Times

# Losses are logged by time as well: a mean hides that most of it comes from one end.
TIME_BUCKETS = 10
BY_TIME = "loss_by_time/"


@struct.dataclass
class Mean:
    """A mean as its total and the count behind it.

    Adding both over parts of a batch, devices and steps gives the mean of the whole.
    """

    total: Float[Array, "*k"] | Abstract
    count: Float[Array, "*k"] | Abstract

    @property
    def value(self) -> Any:
        """The mean; where nothing was counted it is not finite."""
        return self.total / self.count


def mean_of(values: Array) -> Mean:
    """The mean of all of `values`, as float32 or wider."""
    return Mean(jnp.sum(values), jnp.full((), values.size, values.dtype))


def once(value: Array) -> Mean:
    """A value that is counted once, such as what a whole batch has one of."""
    return Mean(value, jnp.ones_like(value))


def mean_by_time(values: PerExample | PerToken, t: Times | Float[Array, "b n"]) -> Mean:
    """Means [TIME_BUCKETS] of `values` with t in [i, i + 1) / TIME_BUCKETS; t = 1 in the last.

    Args:
      values: of examples or tokens.
      t: of examples, or of all tokens, each of which then has its example's value if it has none.
    """
    if values.ndim < t.ndim:
        values = jnp.broadcast_to(values[:, None], t.shape)
    bucket = jnp.clip((t * TIME_BUCKETS).astype(jnp.int32), 0, TIME_BUCKETS - 1)
    zeros = jnp.zeros(TIME_BUCKETS, values.dtype)
    return Mean(zeros.at[bucket].add(jax.lax.stop_gradient(values)), zeros.at[bucket].add(1))


def add_steps(history: Mapping[str, Mean]) -> dict[str, Mean]:
    """Metrics of all steps together, in float64, of metrics [k, ...] of k steps."""
    return jax.tree.map(lambda x: np.sum(x, axis=0, dtype=np.float64), dict(history))


def logged(metrics: Mapping[str, Mean]) -> dict[str, float]:
    """Means by the names under which they are logged.

    Those by time are {'loss_by_time/<term>/0.3': mean at t in [0.3, 0.4), ...} without the empty
    buckets.
    """
    named = {}
    for name, mean in metrics.items():
        if not name.startswith(BY_TIME):
            named[name] = float(mean.value)
            continue
        for i, (total, count) in enumerate(zip(mean.total, mean.count, strict=True)):
            if count:
                named[f"{name}/{i / TIME_BUCKETS:.1f}"] = float(total / count)
    return named
