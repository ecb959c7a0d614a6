"""Flow matching: the network predicts the velocity of a Gaussian path.

  linear:  alpha = 1 - t,          sigma = t,            v = eps - x_0
  cosine:  alpha = cos(pi t / 2),  sigma = sin(pi t / 2)

Time is given to the network as it is, in [0, 1]. Source: SiT, arXiv 2401.08740, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from ig_jax.diffusion import process
from ig_jax.diffusion.process import Coefficients
from ig_jax.diffusion.times import TIMES
from ig_jax.types import Key, Latents, Times


class Linear:
    """Straight lines between data and noise."""

    def coefficients(self, t: Array) -> Coefficients:
        return Coefficients(1 - t, t, -jnp.ones_like(t), jnp.ones_like(t))

    def time_of_ratio(self, ratio: Array) -> Array:
        return ratio / (1 + ratio)


class Cosine:
    """A quarter circle: alpha^2 + sigma^2 = 1."""

    def coefficients(self, t: Array) -> Coefficients:
        angle, rate = t * jnp.pi / 2, jnp.pi / 2
        alpha, sigma = jnp.cos(angle), jnp.sin(angle)
        return Coefficients(alpha, sigma, -rate * sigma, rate * alpha)

    def time_of_ratio(self, ratio: Array) -> Array:
        return 2 / jnp.pi * jnp.arctan(ratio)


PATHS = {"linear": Linear(), "cosine": Cosine()}


@dataclass(frozen=True)
class Flow:
    """Velocity prediction on a path, with times from a distribution."""

    path: str  # linear, cosine
    time_distribution: str  # uniform, lognormal

    def __post_init__(self):
        if self.path not in PATHS:
            raise ValueError(f"path = {self.path!r}: must be one of {', '.join(PATHS)}")
        if self.time_distribution not in TIMES:
            raise ValueError(
                f"time_distribution = {self.time_distribution!r}: must be one of {', '.join(TIMES)}"
            )

    def coefficients(self, t: Array) -> Coefficients:
        return PATHS[self.path].coefficients(process.expand(t))

    def draw_time(self, key: Key, n: int) -> Times:
        """The standard draws that `time` turns into times."""
        return TIMES[self.time_distribution].draw(key, n)

    def time(self, draw: Times) -> Times:
        return TIMES[self.time_distribution].time(PATHS[self.path], draw)

    def perturb(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        c = self.coefficients(t)
        return c.alpha * x0 + c.sigma * noise

    def target(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        return process.velocity_from_noise_and_data(self.coefficients(t), noise, x0)

    def condition_time(self, t: Times) -> Times:
        return t

    def velocity(self, pred: Latents, x: Latents, t: Array) -> Latents:
        return pred

    def score(self, velocity: Latents, x: Latents, t: Array) -> Latents:
        """Score of p_t at x from a (possibly guided) velocity; t in (0, 1]."""
        return process.score_from_velocity(self.coefficients(t), velocity, x)
