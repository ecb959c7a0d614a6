"""Flow matching on a Gaussian path.

  linear:  alpha = 1 - t,          sigma = t,            v = eps - x_0
  cosine:  alpha = cos(pi t / 2),  sigma = sin(pi t / 2)                  (GVP)
  vp:      alpha = exp(-(b_max - b_min) t^2 / 4 - b_min t / 2),  sigma = sqrt(1 - alpha^2)

The network predicts the velocity, the noise or the score. Time is given to it as it is, in [0, 1].
Source: SiT, arXiv 2401.08740, section 2 and appendix A, and its published transport, which
LightningDiT shares; there time runs from noise to data.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from ig_jax.diffusion import process
from ig_jax.diffusion.process import Coefficients
from ig_jax.diffusion.training_times import TIMES
from ig_jax.errors import shown
from ig_jax.types import GroupTimes, Key, Latents, Times


class Linear:
    """Straight lines between data and noise."""

    def coefficients(self, t: Array) -> Coefficients:
        return Coefficients(1 - t, t, -jnp.ones_like(t), jnp.ones_like(t))

    def time_of_ratio(self, ratio: Array) -> Array:
        return ratio / (1 + ratio)


class CosinePath:
    """A quarter circle: alpha^2 + sigma^2 = 1."""

    def coefficients(self, t: Array) -> Coefficients:
        angle, rate = t * jnp.pi / 2, jnp.pi / 2
        alpha, sigma = jnp.cos(angle), jnp.sin(angle)
        return Coefficients(alpha, sigma, -rate * sigma, rate * alpha)

    def time_of_ratio(self, ratio: Array) -> Array:
        return 2 / jnp.pi * jnp.arctan(ratio)


class VariancePreserving:
    """DDPM's schedule in continuous time: beta rises linearly from 0.1 to 20."""

    beta_min, beta_max = 0.1, 20.0

    def coefficients(self, t: Array) -> Coefficients:
        rise = self.beta_max - self.beta_min
        log_alpha = -(t**2) * rise / 4 - t * self.beta_min / 2
        d_log_alpha = -t * rise / 2 - self.beta_min / 2
        return process.variance_preserving(log_alpha, d_log_alpha)

    def time_of_ratio(self, ratio: Array) -> Array:
        """At most 1, where sigma / alpha is about 150."""
        rise, b = self.beta_max - self.beta_min, self.beta_min
        root = jnp.sqrt(b**2 / 4 + rise * jnp.log1p(ratio**2) / 2)
        return jnp.minimum(2 / rise * (root - b / 2), 1)


PATHS = {"linear": Linear(), "cosine": CosinePath(), "vp": VariancePreserving()}
PREDICTIONS = ("velocity", "noise", "score")

# How near to the ends of [0, 1] times come where a formula divides by zero there, as published.
END, VP_TRAINING_END = 1e-3, 1e-5


@dataclass(frozen=True)
class Flow(process.GaussianProcess):
    """A path, what the network predicts on it, and a distribution of training times."""

    path: str  # linear, cosine, vp
    time_distribution: str  # uniform, lognormal, logit_normal
    time_mean: float = 0.0  # of the normal draw behind the last two
    time_std: float = 1.0
    prediction: str = "velocity"  # velocity, noise, score

    def __post_init__(self):
        for name, known in (
            ("path", PATHS),
            ("prediction", PREDICTIONS),
            ("time_distribution", TIMES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} = {shown(getattr(self, name))}: must be one of {', '.join(known)}"
                )
        if self.time_std <= 0:
            raise ValueError(f"time_std = {self.time_std}: must be above 0")

    def interval(self, *, sampling: bool) -> tuple[float, float]:
        """First and last time that training draws or a sampler visits.

        All of [0, 1], but for a path whose sigma' is infinite at 0 (vp) and for predictions that
        no velocity follows from at the ends (alpha = 0 or sigma = 0).
        """
        if self.path == "vp":
            return (END if sampling else VP_TRAINING_END), 1.0
        return (0.0, 1.0) if self.prediction == "velocity" else (END, 1 - END)

    def coefficients(self, t: Array) -> Coefficients:
        return PATHS[self.path].coefficients(process.expand(t))

    def time_of_ratio(self, ratio: Array) -> Array:
        return jnp.minimum(PATHS[self.path].time_of_ratio(ratio), self.interval(sampling=True)[1])

    def draw_time(self, key: Key, n: int) -> Times:
        """The standard draws that `time` turns into times."""
        return TIMES[self.time_distribution].draw(key, n)

    def time(self, draw: GroupTimes) -> GroupTimes:
        distribution = TIMES[self.time_distribution]
        t = distribution.time(PATHS[self.path], draw, self.time_mean, self.time_std)
        low, high = self.interval(sampling=False)
        return low + (high - low) * t

    def less_noisy(self, t: GroupTimes, draw: GroupTimes, most: float) -> GroupTimes:
        """Times earlier than t by `most` times the uniform `draw`, within those of training."""
        return jnp.clip(t - most * draw, *self.interval(sampling=False))

    def target(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        """Target of `comparable` predictions: v, eps, or -eps (sigma times the score)."""
        if self.prediction == "velocity":
            return process.velocity_from_noise_and_data(self.coefficients(t), noise, x0)
        return noise if self.prediction == "noise" else -noise

    def comparable(self, pred: Latents, t: Times) -> Latents:
        """A prediction in the scale of `target`: the score grows as 1 / sigma, so its error may not
        be taken as it is."""
        return pred * self.coefficients(t).sigma if self.prediction == "score" else pred

    def condition_time(self, t: GroupTimes) -> GroupTimes:
        return t

    def velocity(self, pred: Latents, x: Latents, t: Array) -> Latents:
        if self.prediction == "velocity":
            return pred
        c = self.coefficients(t)
        if self.prediction == "noise":
            return process.velocity_from_noise(c, pred, x)
        return process.velocity_from_score(c, pred, x)
