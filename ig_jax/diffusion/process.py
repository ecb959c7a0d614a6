"""Conversions between velocity, score, data and noise, once for every Gaussian path.

Symbols, for the whole package:

  x_t = alpha(t) x_0 + sigma(t) eps        t = 0: data, alpha = 1, sigma = 0;  t = 1: noise
  v   = dx_t/dt = alpha'(t) x_0 + sigma'(t) eps
  score = grad log p_t(x_t) = -eps / sigma

At fixed (x_t, t) every map between these is affine, and guidance weights sum to one, so guiding
commutes with converting. Other names in the literature: `encoder_depth` of the published IG code is
our readout depth, and `sg_*` in its sampler is our `ig_*`.

Source: SiT (arXiv 2401.08740) section 2; the formulas follow from solving the two lines above for
x_0 and eps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array

from ig_jax.types import Latents, Times

ROUNDING = 1e-7  # an alpha below it is 0: the cosine of pi / 2 is -4e-8 in float32


@dataclass(frozen=True)
class Coefficients:
    """alpha, sigma and their time derivatives, each broadcastable against latents."""

    alpha: Array
    sigma: Array
    d_alpha: Array
    d_sigma: Array

    @property
    def wronskian(self) -> Array:
        """alpha sigma' - alpha' sigma: what both inversions divide by; positive on (0, 1)."""
        return self.alpha * self.d_sigma - self.d_alpha * self.sigma


@runtime_checkable
class Path(Protocol):
    """A path in (alpha, sigma)."""

    def coefficients(self, t: Array) -> Coefficients: ...

    def time_of_ratio(self, ratio: Array) -> Array:
        """The time at which sigma / alpha equals `ratio`."""
        ...


def expand(t: Array) -> Array:
    """Times [b] or a scalar -> broadcastable against latents [b, h, w, c]."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (4 - t.ndim)) if t.ndim else t


def variance_preserving(log_alpha: Array, d_log_alpha: Array) -> Coefficients:
    """Those with alpha^2 + sigma^2 = 1; sigma' is infinite where sigma is 0."""
    alpha = jnp.exp(log_alpha)
    sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
    return Coefficients(alpha, sigma, alpha * d_log_alpha, -(alpha**2) * d_log_alpha / sigma)


def data_from_velocity(c: Coefficients, v: Latents, x: Latents) -> Latents:
    """x_0 = (sigma' x - sigma v) / (alpha sigma' - alpha' sigma)."""
    return (c.d_sigma * x - c.sigma * v) / c.wronskian


def noise_from_velocity(c: Coefficients, v: Latents, x: Latents) -> Latents:
    """eps = (alpha v - alpha' x) / (alpha sigma' - alpha' sigma)."""
    return (c.alpha * v - c.d_alpha * x) / c.wronskian


def score_from_velocity(c: Coefficients, v: Latents, x: Latents) -> Latents:
    """-eps / sigma; unbounded as sigma -> 0."""
    return -noise_from_velocity(c, v, x) / c.sigma


def velocity_from_data(c: Coefficients, x0: Latents, x: Latents) -> Latents:
    """v = alpha' x_0 + sigma' (x - alpha x_0) / sigma; needs sigma > 0."""
    return velocity_from_noise_and_data(c, (x - c.alpha * x0) / c.sigma, x0)


def velocity_from_noise(c: Coefficients, noise: Latents, x: Latents) -> Latents:
    """v = sigma' eps + alpha' (x - sigma eps) / alpha; needs alpha > 0."""
    return velocity_from_noise_and_data(c, noise, (x - c.sigma * noise) / c.alpha)


def velocity_from_score(c: Coefficients, score: Latents, x: Latents) -> Latents:
    """v for eps = -sigma score; needs alpha > 0."""
    return velocity_from_noise(c, -c.sigma * score, x)


def velocity_from_noise_and_data(c: Coefficients, noise: Latents, x0: Latents) -> Latents:
    """v = alpha' x_0 + sigma' eps: the target of flow matching."""
    return c.d_alpha * x0 + c.d_sigma * noise


class GaussianProcess(ABC):
    """Base of processes x_t = alpha(t) x0 + sigma(t) noise."""

    @abstractmethod
    def coefficients(self, t: Array) -> Coefficients:
        """At times [b] or one time, broadcastable against latents."""

    @abstractmethod
    def time_of_ratio(self, ratio: Array) -> Array:
        """The time at which sigma / alpha equals `ratio`; at most the first one of sampling."""

    @abstractmethod
    def velocity(self, pred: Latents, x: Latents, t: Array) -> Latents:
        """The velocity that follows from the network's prediction at x."""

    def noise(self, pred: Latents, x: Latents, t: Array) -> Latents:
        """The noise in x that follows from the network's prediction."""
        return noise_from_velocity(self.coefficients(t), self.velocity(pred, x, t), x)

    def perturb(self, x0: Latents, noise: Latents, t: Times) -> Latents:
        c = self.coefficients(t)
        return c.alpha * x0 + c.sigma * noise

    def score(self, velocity: Latents, x: Latents, t: Array) -> Latents:
        """Score of p_t at x from a (possibly guided) velocity; t in (0, 1]."""
        return score_from_velocity(self.coefficients(t), velocity, x)
