"""A guard against loss spikes: an update whose gradient is far larger than usual is not made.

With n the global norm of the gradient over the trained leaves, before clipping, and m the median of
the last `window` norms, the update is skipped where n > factor m, or where n is not finite. Then
parameters and the state of the optimizer stay as they were, its count of updates included. Every
finite norm enters the window, a skipped one too: after half a window of larger norms they are the
median, and updates go on. The median, because one outlier would move a mean.

The optimizer computes its update in any case and `where` throws it away. A `cond` would save that
once in thousands of steps, and cost every other step: its result is a buffer of the size of the
parameters that no longer fuses with adding it to them, and on a GPU the host waits for the
predicate.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ig_jax.optim import trainable
from ig_jax.types import Params, Scalar


class SpikeState(NamedTuple):
    inner: optax.OptState  # of the guarded optimizer
    norms: Array  # float32 [window], a ring: the k-th finite norm lies at k % window
    seen: Array  # int32 [], finite norms so far
    skipped: Array  # int32 [], updates that were not made


def _median(norms: Array, seen: Array) -> Scalar:
    """Of the norms that have been seen and are still in the ring; inf if there are none."""
    window = norms.shape[0]
    ordered = jnp.sort(jnp.where(jnp.arange(window) < seen, norms, jnp.inf))
    count = jnp.clip(seen, 1, window)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def skip_spikes(
    optimizer: optax.GradientTransformation, factor: float, window: int = 128, least: int = 16
) -> optax.GradientTransformation:
    """`optimizer` without the updates whose gradient is a spike.

    Args:
      optimizer: anything that may see the whole gradient, clipping included.
      factor: times the running median, above which a norm is a spike.
      window: how many norms the median is of.
      least: norms that must have been seen before a finite one can be a spike.

    Raises:
      ValueError: factor, window or least is out of range.
    """
    if not factor > 1:
        raise ValueError(f"factor = {factor}: must be above 1; half of all norms exceed the median")
    if not 1 <= least <= window:
        raise ValueError(f"least = {least}: must lie in 1..window = {window}")

    def init(params: Params) -> SpikeState:
        inner = optimizer.init(params)
        return SpikeState(inner, jnp.zeros(window, jnp.float32), jnp.int32(0), jnp.int32(0))

    def update(grads: Params, state: SpikeState, params: Params | None = None):
        norm = trainable.gradient_norm(grads).astype(jnp.float32)
        finite = jnp.isfinite(norm)
        spike = (state.seen >= least) & (norm > factor * _median(state.norms, state.seen))
        skip = spike | ~finite

        updates, inner = optimizer.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates)
        inner = jax.tree.map(lambda old, new: jnp.where(skip, old, new), state.inner, inner)

        entered = state.norms.at[state.seen % window].set(norm)
        return updates, SpikeState(
            inner=inner,
            norms=jnp.where(finite, entered, state.norms),
            seen=state.seen + finite.astype(jnp.int32),
            skipped=state.skipped + skip.astype(jnp.int32),
        )

    return optax.GradientTransformation(init, update)
