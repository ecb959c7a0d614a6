"""Ancestral sampling of DDPM, and DDIM, over all of its thousand steps or fewer.

Both predict x0 from the guided noise, and go on to the next kept step (`diffusion/ddpm_steps.py`):

  ancestral   N(m_0 x0 + m_x x, variance that the network places between beta~ and beta)
  DDIM        sqrt(a_prev) x0 + sqrt(1 - a_prev - s^2) noise + s z,   s^2 = eta^2 beta~

Nothing is added in the last step, which ends at the mean. The network is asked about the steps that
are kept, by their numbers among the thousand. DDIM at eta = 1 is ancestral sampling at the lower
variance.

Sources: improved DDPM, arXiv 2102.09672, sections 3.1 and 4; DDIM, arXiv 2010.02502, section 4. The
published tables of DiT take 250 ancestral steps.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from ig_jax.bounds import at_most
from ig_jax.diffusion.ddpm import DDPM, STEPS
from ig_jax.diffusion.ddpm_steps import EVEN, Step, Steps, kept_steps
from ig_jax.samplers.base import FixedGrid
from ig_jax.types import Field, Latents, Scalar


@dataclass(frozen=True)
class StepsOfDDPM(FixedGrid):
    """The steps that `num_steps` and `spacing` keep (`kept_steps`); one evaluation each."""

    num_steps: int = at_most(STEPS)
    spacing: str = EVEN  # even, stride, or numbers of steps from equal sections: 10,15,20
    clip_denoised: bool = False  # x0 to [-1, 1]: for pixels, not for latents

    order: ClassVar[int] = 1
    process: ClassVar[type[DDPM]] = DDPM

    def __post_init__(self):
        super().__post_init__()
        kept_steps(self.num_steps, self.spacing)

    @cached_property
    def steps(self) -> Steps:
        return Steps(kept_steps(self.num_steps, self.spacing))

    def grid(self) -> np.ndarray:
        return np.append(self.steps.times[::-1], 0.0)

    def step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents) -> Latents:
        mean, deviation = self._next(field, x, t)
        return mean + deviation * noise

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents:
        return self._next(field, x, t)[0]

    @abstractmethod
    def _next(self, field: Field, x: Latents, t: Scalar) -> tuple[Latents, Latents | Scalar]:
        """Mean and standard deviation of the latents at the next kept step."""

    def _data(self, step: Step, noise: Latents, x: Latents) -> Latents:
        x0 = step.data(noise, x)
        return jnp.clip(x0, -1, 1) if self.clip_denoised else x0


@dataclass(frozen=True)
class Ancestral(StepsOfDDPM):
    """DDPM's own sampler, with the variance that the network has learned."""

    reads_variance: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def _next(self, field: Field, x: Latents, t: Scalar) -> tuple[Latents, Latents | Scalar]:
        step = self.steps.at(t, x.dtype)
        noise, variance = field.noise_and_variance(x, t)
        deviation = jnp.exp(step.log_variance(variance) / 2)
        return step.mean(self._data(step, noise, x), x), deviation


@dataclass(frozen=True)
class DDIM(StepsOfDDPM):
    """Deterministic at eta = 0; as noisy as ancestral sampling at 1."""

    eta: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta = {self.eta}: must lie in [0, 1]; 0 adds no noise")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def _next(self, field: Field, x: Latents, t: Scalar) -> tuple[Latents, Latents | Scalar]:
        step = self.steps.at(t, x.dtype)
        noise, _ = field.noise_and_variance(x, t)
        x0 = self._data(step, noise, x)
        deviation = self.eta * step.deviation
        left = jnp.sqrt(step.noise_prev - deviation**2)
        return step.alpha_prev * x0 + left * step.noise(x0, x), deviation
