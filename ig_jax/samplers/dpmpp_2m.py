"""DPM-Solver++(2M): two steps of the prediction of the data, in half the log SNR.

  x <- sigma' / sigma x + (alpha' - alpha sigma' / sigma) D,      ' at the end of the step
  D  = x_0 + h / (2 h_before) (x_0 - x_0 before),                 h = lambda' - lambda

with lambda = log(alpha / sigma) and x_0 from the velocity. The factor of D is the paper's
alpha' (1 - exp(-h)), written so that it is finite at both ends. A constant x_0 is followed exactly,
on any grid.

Where lambda is infinite the step is of first order (D = x_0, which is DDIM): the last one always,
to sigma = 0, and, on a path that begins in pure noise, the second, since h_before has no end. There
the published code starts and ends a little inside, where lambda is finite.

Source: arXiv 2211.01095, algorithm 2 and section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from ig_jax.diffusion.process import ROUNDING, Coefficients, data_from_velocity
from ig_jax.samplers.multistep import Multistep, Past, in_the_middle
from ig_jax.types import Field, Latents, Scalar


def _position(c: Coefficients) -> Scalar:
    """-lambda, which falls from noise to data."""
    alpha = jnp.where(c.alpha < ROUNDING, 0, c.alpha)
    return jnp.log(c.sigma) - jnp.log(alpha)


def _move(x: Latents, data: Latents, here: Coefficients, there: Coefficients) -> Latents:
    ratio = there.sigma / here.sigma
    return ratio * x + (there.alpha - here.alpha * ratio) * data


@dataclass(frozen=True)
class DPMpp2M(Multistep):
    """Second order, one evaluation a step: the data predicted a step before are used again."""

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, past: Past
    ) -> tuple[Latents, Past]:
        here, there = field.coefficients(t), field.coefficients(t_next)
        now = Past(_position(here), data_from_velocity(here, field.velocity(x, t), x))
        return _move(x, in_the_middle(past, now, _position(there)), here, there), now

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar, past: Past) -> Latents:
        here, there = field.coefficients(t), field.coefficients(t_next)
        return _move(x, data_from_velocity(here, field.velocity(x, t), x), here, there)
