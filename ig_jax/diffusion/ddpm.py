"""DDPM's thousand steps, which DiT is trained on, as a Gaussian path in continuous time.

  beta_k   linear from 1e-4 (k = 0) to 0.02 (k = 999)
  alpha^2  prod_{i <= k} (1 - beta_i)  at t = (k + 1) / 1000,      sigma^2 = 1 - alpha^2

Between the steps log alpha is a polynomial in t that meets all thousand values and log alpha(0) = 0
to 1e-12, so that alpha is smooth and every sampler, guidance interval and shift of times works as
on the other paths. The network predicts the noise, and is told k = 1000 t - 1, fractional between
the steps.

Training draws one of the steps and takes the plain squared error of the noise, DDPM's L_simple. The
half of a DiT's output that interpolates the variance gets no gradient from that, but from the term
`variational_bound`; ancestral sampling alone reads it. Both go by the steps themselves, whose
constants are in `ddpm_steps.py`.

Sources: DDPM, arXiv 2006.11239, sections 2 to 4; DiT, arXiv 2212.09748, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.polynomial import Polynomial

from ig_jax.diffusion import process
from ig_jax.diffusion.flow import VariancePreserving
from ig_jax.diffusion.process import Coefficients
from ig_jax.diffusion.training_times import TIMES
from ig_jax.types import GroupTimes, Key, Latents, Times

STEPS = 1000
BETAS = np.linspace(1e-4, 0.02, STEPS)


def _log_alpha() -> Polynomial:
    """log alpha as t times a polynomial: its Taylor series gains two digits with every degree."""
    times = np.arange(1, STEPS + 1) / STEPS
    values = np.cumsum(np.log1p(-BETAS)) / 2
    return Polynomial([0, 1]) * Polynomial.fit(times, values / times, deg=6).convert()


LOG_ALPHA = _log_alpha()
_WHOLE = 1e-4  # of a step: nearer than this, a time is that of the step


def _evaluate(polynomial: Polynomial, t: Array) -> Array:
    return jnp.polyval(jnp.asarray(polynomial.coef[::-1], t.dtype), t)


@dataclass(frozen=True)
class DDPM(process.GaussianProcess):
    """The published schedule; there is nothing to choose."""

    path: ClassVar[str] = "ddpm"  # told apart from those of `Flow`

    def interval(self, *, sampling: bool) -> tuple[float, float]:
        """From the least to the most noisy step, in training as in sampling."""
        return 1 / STEPS, 1.0

    def coefficients(self, t: Array) -> Coefficients:
        t = process.expand(t)
        return process.variance_preserving(_evaluate(LOG_ALPHA, t), _evaluate(LOG_ALPHA.deriv(), t))

    def time_of_ratio(self, ratio: Array) -> Array:
        """By Newton's method, from the time on the continuous path (`flow.VariancePreserving`).

        That is off by at most 4e-3; three steps leave the rounding of float64.
        """
        log_alpha = jnp.maximum(-jnp.log1p(ratio**2) / 2, LOG_ALPHA(1.0))
        t = VariancePreserving().time_of_ratio(ratio)
        for _ in range(3):
            t = t - (_evaluate(LOG_ALPHA, t) - log_alpha) / _evaluate(LOG_ALPHA.deriv(), t)
        return jnp.minimum(t, 1)

    def draw_time(self, key: Key, n: int) -> Times:
        """Uniform draws in [0, 1)."""
        return TIMES["uniform"].draw(key, n)

    def time(self, draw: GroupTimes) -> GroupTimes:
        """Each of the thousand steps for an equal share of the draws."""
        step = jnp.minimum(jnp.floor(draw * STEPS), STEPS - 1)
        return (step + 1) / STEPS

    def less_noisy(self, t: GroupTimes, draw: GroupTimes, most: float) -> GroupTimes:
        """Times of steps earlier by 0 to `most` x 1000 - 1, each for an equal share of the draws.

        At least step 1, as in the published SRA: from step 0 it is a noisier one.
        """
        earlier = jnp.floor(draw * int(most * STEPS))
        return (jnp.clip(jnp.round(self.condition_time(t)) - earlier, 1, STEPS - 1) + 1) / STEPS

    def target(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        return noise

    def comparable(self, pred: Latents, t: Times) -> Latents:
        return pred

    def condition_time(self, t: GroupTimes) -> GroupTimes:
        """The step, from 0; not below it. At a step's own time it is whole, as published.

        Times near 1 in float32 are up to 6e-5 of a step off, which the network would see.
        """
        step = jnp.maximum(t * STEPS - 1, 0)
        whole = jnp.round(step)
        return jnp.where(jnp.abs(step - whole) < _WHOLE, whole, step)

    def velocity(self, pred: Latents, x: Latents, t: Array) -> Latents:
        return process.velocity_from_noise(self.coefficients(t), pred, x)

    def noise(self, pred: Latents, x: Latents, t: Array) -> Latents:
        return pred
