"""Variational bound of a step of DDPM, in bits a dimension: it trains the variance.

  L = KL(q(x_prev | x_t, x0) || p(x_prev | x_t)) / ln 2      at every step but the lowest
  L = -log2 p(x0 | x_t), with x0 in bins of 2 / 255           at the lowest

p has the mean that follows from the predicted noise, and the log variance that the network places
between log beta~ and log beta (`diffusion/ddpm_steps.py`). The noise is taken as given, so that the
squared error alone trains it, and the term alone the variance. The bins are those of 8-bit images
in [-1, 1], also where latents are none, as published.

Source: improved DDPM, arXiv 2102.09672, section 3.1, as DiT uses it: added to the mean squared
error with weight 1, not rescaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ig_jax.diffusion.ddpm_steps import Steps, step_of
from ig_jax.objectives.base import Needs, NoisedBatch, Term
from ig_jax.objectives.token_groups import GroupSettings
from ig_jax.types import NONE, Latents, Params, PerExample

BIN = 1 / 255  # half of its width
SMALLEST = 1e-12  # of a probability


@dataclass(frozen=True)
class VariationalBound(Term):
    """The bound of the drawn step; needs a network that predicts a variance, and DDPM's steps."""

    steps: ClassVar[Steps] = Steps()

    @property
    def needs(self) -> Needs:
        return Needs(variance=True)

    def check_groups(self, groups: GroupSettings) -> None:
        if groups.dual_time:
            raise ValueError(
                "is of one step for each image, but objective.groups.dual_time gives it several; "
                "turn that off, or leave the term out"
            )

    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        step = self.steps.at(batch.t, batch.x_t.dtype)
        x0 = step.data(lax.stop_gradient(batch.out.pred), batch.x_t)
        mean, log_variance = step.mean(x0, batch.x_t), step.log_variance(batch.out.variance)
        true_mean = step.mean(batch.x0, batch.x_t)
        divergence = kl_of_normals(true_mean, step.log_posterior, mean, log_variance)
        likelihood = log_likelihood(batch.x0, mean, log_variance / 2)
        lowest = step_of(batch.t) == 0
        nats = jnp.where(
            lowest,
            -jnp.mean(likelihood, axis=(1, 2, 3)),
            jnp.mean(divergence, axis=(1, 2, 3)),
        )
        return nats / math.log(2)


def kl_of_normals(
    mean: Latents, log_variance: Array, other_mean: Latents, other_log_variance: Array
) -> Latents:
    """KL(N(mean, variance) || N(other_mean, other_variance)) of every pixel, in nats."""
    narrower = log_variance - other_log_variance
    square = (mean - other_mean) ** 2 * jnp.exp(-other_log_variance)
    return 0.5 * (-1 - narrower + jnp.exp(narrower) + square)


def log_likelihood(x: Latents, mean: Latents, log_scale: Latents) -> Latents:
    """Log probability, in nats, of the bin around every pixel of x; those at the ends are open."""

    def below(distance: Latents) -> Latents:
        """The normal distribution function, by the published approximation."""
        z = distance * jnp.exp(-log_scale)
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = below(x - mean + BIN), below(x - mean - BIN)
    inside = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(inside, SMALLEST))
