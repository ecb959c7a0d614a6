"""EDM's stochastic sampler: before each step of Heun's method noise is added, and time goes back.

  r' = (1 + gamma) r,                gamma = min(s_churn / num_steps, sqrt(2) - 1)
  x' = alpha' (x / alpha + sqrt(r'^2 - r^2) s_noise z),      then Heun's step from there to t_next

where s_min <= r <= s_max; in other steps x' = x. r is sigma / alpha at time t, which is the paper's
noise level, that of x / alpha; alpha' is taken at the time of r'. At s_noise = 1, x' is distributed
as latents of that time are. Both slopes are guided as at t.

It differs from the paper in three things. The grid is even in time, as those of other samplers, not
that of rho = 7. The last step adds no noise: on the paper's grids it begins below every s_min. And
no noise is added beyond the first time of sampling, nor to pure noise, where r is infinite.

Source: EDM, arXiv 2206.00364, algorithm 2; the defaults are its settings for ImageNet-64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import jax.numpy as jnp

from ig_jax.diffusion.process import ROUNDING
from ig_jax.samplers.heun import Heun
from ig_jax.types import Field, Latents, Scalar

MOST_CHURN = sqrt(2) - 1  # no more noise is added than there is


@dataclass(frozen=True)
class EDMStochastic(Heun):
    """Heun's method behind added noise; of second order in the distribution."""

    s_churn: float = 40.0  # noise added in all steps together; 0 adds none
    # Least and most sigma / alpha to which noise is added.
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003  # standard deviation of the noise; above 1 against lost detail

    def __post_init__(self):
        super().__post_init__()
        if not self.s_churn >= 0:
            raise ValueError(f"s_churn = {self.s_churn}: must not be negative; 0 adds no noise")
        if not 0 <= self.s_min <= self.s_max:
            raise ValueError(
                f"s_min = {self.s_min}, s_max = {self.s_max}: must satisfy 0 <= s_min <= s_max"
            )
        if not self.s_noise > 0:
            raise ValueError(f"s_noise = {self.s_noise}: must be above 0; 1 is the exact variance")

    @property
    def stochastic(self) -> bool:
        return self.s_churn > 0

    @property
    def gamma(self) -> float:
        """By which share the ratio of sigma to alpha rises where noise is added."""
        return min(self.s_churn / self.num_steps, MOST_CHURN)

    def step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents) -> Latents:
        if self.stochastic:
            x, t = self._noisier(field, x, t, noise)
        return super().step(field, x, t, t_next)

    def _noisier(
        self, field: Field, x: Latents, t: Scalar, noise: Latents
    ) -> tuple[Latents, Scalar]:
        """Latents with noise added, and their time; both as they are where none is."""
        here = field.coefficients(t)
        pure = here.alpha < ROUNDING
        alpha = jnp.where(pure, 1, here.alpha)
        ratio = here.sigma / alpha
        adds = ~pure & (self.s_min <= ratio) & (ratio <= self.s_max)

        # The noise is that between the two times, as one may be cut to the first of sampling.
        noisier = jnp.maximum(field.time_of_ratio((1 + self.gamma) * ratio), t)
        there = field.coefficients(noisier)
        scale = there.alpha / alpha
        spread = jnp.sqrt(jnp.maximum(there.sigma**2 - (scale * here.sigma) ** 2, 0))
        moved = scale * x + self.s_noise * spread * noise
        return jnp.where(adds, moved, x), jnp.where(adds, noisier, t)
