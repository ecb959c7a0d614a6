"""Euler-Maruyama on the reverse SDE with the published diffusion w(t) = 2t.

  drift = v - w/2 score,      x <- x + drift dt + sqrt(w |dt|) z,      dt < 0

The grid has `num_steps` points from 1 to 0.04 and then 0: num_steps - 1 noisy steps and one step
along the drift alone, because the score is unbounded at 0. These are the settings behind the
published SiT + IG tables (250 steps). Source: SiT, arXiv 2401.08740, section 2.4 and its sampler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from ig_jax.samplers.base import FixedGrid, even_times
from ig_jax.types import Field, Latents, Scalar

LAST_TIME = 0.04  # where noise stops being added


@dataclass(frozen=True)
class EulerMaruyama(FixedGrid):
    """Stochastic; one evaluation a step."""

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    fewest_steps: ClassVar[int] = 2  # one noisy step and the last one

    def grid(self) -> np.ndarray:
        return np.append(even_times(1.0, LAST_TIME, self.num_steps), 0.0)

    def _drift(self, field: Field, x: Latents, t: Scalar) -> Latents:
        velocity = field.velocity(x, t)
        return velocity - t * field.score(velocity, x, t)  # w / 2 = t

    def step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents) -> Latents:
        spread = jnp.sqrt(2 * t * (t - t_next))
        return x + (t_next - t) * self._drift(field, x, t) + spread * noise

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents:
        return x + (t_next - t) * self._drift(field, x, t)
