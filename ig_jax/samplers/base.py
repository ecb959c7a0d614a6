"""The loop that all fixed-grid samplers share.

A sampler is a frozen dataclass that says which grid it walks and how it takes one step. It sees a
`Field` and times, never a network, a label or a guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ig_jax.types import Field, Latents, Scalar

# Standard normal draws for step i, [b, h, w, c]; deterministic samplers ignore it.
Noise = Callable[[Array], Latents]


@runtime_checkable
class Sampler(Protocol):
    """What `SAMPLERS` holds."""

    num_steps: int
    order: int  # of convergence, which a test measures; strong order does not apply to the SDE
    calls_per_step: int  # evaluations of the field, for the cost shown to the user

    def grid(self) -> np.ndarray:
        """Times from 1 (noise) to 0 (data), float64 [steps + 1]."""
        ...

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents
    ) -> Latents: ...

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents: ...


def require_steps(num_steps: int, least: int) -> None:
    """Raises ValueError for a grid too short to walk."""
    if num_steps < least:
        raise ValueError(f"num_steps = {num_steps}: must be at least {least}")


def sample(
    sampler: Sampler, fields: Sequence[tuple[Field, int, int]], x: Latents, noise: Noise
) -> Latents:
    """Carries x from noise to data along the sampler's grid.

    Args:
      sampler: grid and step rule.
      fields: (field, start, stop) with the field of steps start..stop-1, in order.
      x: standard normal latents [b, h, w, c] at the grid's first time.
      noise: step index -> fresh standard normal latents.

    Returns:
      Latents at the grid's last time, in the dtype of x.
    """
    grid = sampler.grid()
    last = len(grid) - 2
    times = jnp.asarray(grid, x.dtype)

    for field, start, stop in fields:

        def body(x: Latents, i: Array, field: Field = field):
            return sampler.step(field, x, times[i], times[i + 1], noise(i)), None

        x, _ = lax.scan(body, x, jnp.arange(start, min(stop, last)))
        if stop > last:
            x = sampler.last_step(field, x, times[last], times[last + 1])
    return x
