"""Steps of DDPM between noise levels, over all of its thousand or over those that are kept.

Symbols, for a kept step k and the kept one below it (a_prev = 1 below the lowest):

  a          alpha^2 at k, prod_{i <= k} (1 - beta_i) over all thousand
  beta       1 - a / a_prev, the thousand betas themselves where all are kept
  posterior  q(x_prev | x, x0) = N(m_0 x0 + m_x x, beta~)
             m_0 = beta sqrt(a_prev) / (1 - a),   m_x = (1 - a_prev) sqrt(1 - beta) / (1 - a),
             beta~ = beta (1 - a_prev) / (1 - a)

A DiT places the log variance of its step between log beta~ (at -1) and log beta (at 1). At the
lowest step beta~ is 0; its logarithm is taken from the next one, as published.

Tables are made in float64 on the host, and used in the dtype of the latents.

Sources: DDPM, arXiv 2006.11239, section 2; improved DDPM, arXiv 2102.09672, sections 3.1 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ig_jax.diffusion import process
from ig_jax.diffusion.ddpm import BETAS, STEPS
from ig_jax.errors import shown
from ig_jax.types import Latents

EVEN, STRIDE = "even", "stride"


def kept_steps(num_steps: int, spacing: str) -> tuple[int, ...]:
    """The steps, of 0 (least noisy) to 999, that `num_steps` visit; ascending.

    Args:
      num_steps: how many.
      spacing: `even` (published as "250"): the first, the last, and even fractions between them,
        rounded; `stride` (published as "ddim25"): every so-manieth from 0; or numbers such as
        "10,15,20": so many evenly from each of as many equal sections, the least noisy first.

    Raises:
      ValueError: there are no such steps.
    """
    if not 1 <= num_steps <= STEPS:
        raise ValueError(f"num_steps = {num_steps}: must lie in 1..{STEPS}, the steps of DDPM")
    if spacing == EVEN:
        return _sections([num_steps])
    if spacing == STRIDE:
        return _stride(num_steps)
    numbers = spacing.split(",")
    if not all(number.strip().isdecimal() and len(number) <= 9 for number in numbers):
        raise ValueError(
            f"spacing = {shown(spacing)}: must be {EVEN}, {STRIDE}, or steps of each section such "
            "as 10,15,20"
        )
    counts = [int(number) for number in numbers]
    if sum(counts) != num_steps:
        raise ValueError(
            f"spacing = {shown(spacing)}: makes {sum(counts)} steps; set num_steps to that, not to "
            f"{num_steps}"
        )
    return _sections(counts)


def _stride(num_steps: int) -> tuple[int, ...]:
    # The smallest stride of those that make as many steps, as published.
    strides = {len(range(0, STEPS, stride)): stride for stride in reversed(range(1, STEPS))}
    if num_steps not in strides:
        nearest = min(strides, key=lambda number: abs(number - num_steps))
        raise ValueError(
            f"num_steps = {num_steps}: no whole stride through {STEPS} steps makes so many; the "
            f"nearest number is {nearest}, and spacing = {EVEN} makes any"
        )
    return tuple(range(0, STEPS, strides[num_steps]))


def _sections(counts: list[int]) -> tuple[int, ...]:
    """So many steps from each of as many sections; the first ones are longer by one if need be."""
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = STEPS // len(counts) + (i < STEPS % len(counts))
        if count > size:
            raise ValueError(
                f"spacing = {shown(','.join(map(str, counts)))}: section {i + 1} has {size} steps, "
                f"of which {count} cannot be kept"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1
        at = 0.0  # a running sum, as published: its rounding decides between two steps
        for _ in range(count):
            kept.append(start + round(at))
            at += stride
        start += size
    return tuple(kept)


class Step(NamedTuple):
    """Constants of a step, each broadcastable against latents; names as at the top."""

    alpha_prev: Array  # sqrt(a_prev)
    noise_prev: Array  # 1 - a_prev
    x0_of_x: Array  # x0 = x0_of_x x - x0_of_noise noise
    x0_of_noise: Array
    m_0: Array
    m_x: Array
    log_beta: Array
    log_posterior: Array  # log beta~
    deviation: Array  # sqrt(beta~), 0 at the lowest step

    def data(self, noise: Latents, x: Latents) -> Latents:
        """The x0 from which this noise leads to x."""
        return self.x0_of_x * x - self.x0_of_noise * noise

    def noise(self, x0: Latents, x: Latents) -> Latents:
        """The noise that leads from this x0 to x."""
        return (self.x0_of_x * x - x0) / self.x0_of_noise

    def mean(self, x0: Latents, x: Latents) -> Latents:
        """Mean of the posterior of x_prev."""
        return self.m_0 * x0 + self.m_x * x

    def log_variance(self, variance: Latents) -> Latents:
        """Between log beta~ (at -1) and log beta (at 1)."""
        upper = (variance + 1) / 2
        return upper * self.log_beta + (1 - upper) * self.log_posterior


@dataclass(frozen=True)
class Steps:
    """Steps between the kept ones, ascending, of DDPM's thousand."""

    kept: tuple[int, ...] = tuple(range(STEPS))

    @cached_property
    def tables(self) -> Step:
        """Constants of the kept steps, float64 [n]."""
        a = np.cumprod(1 - BETAS)[list(self.kept)]
        a_prev = np.append(1.0, a[:-1])
        beta = 1 - a / a_prev
        posterior = beta * (1 - a_prev) / (1 - a)
        # With a single step there is no next one.
        lowest = posterior[1] if len(a) > 1 else beta[0]
        return Step(
            alpha_prev=np.sqrt(a_prev),
            noise_prev=1 - a_prev,
            x0_of_x=np.sqrt(1 / a),
            x0_of_noise=np.sqrt(1 / a - 1),
            m_0=beta * np.sqrt(a_prev) / (1 - a),
            m_x=(1 - a_prev) * np.sqrt(1 - beta) / (1 - a),
            log_beta=np.log(beta),
            log_posterior=np.log(np.append(lowest, posterior[1:])),
            deviation=np.sqrt(posterior),
        )

    @cached_property
    def times(self) -> np.ndarray:
        """Times of the kept steps in the process, float64 [n]."""
        return (np.array(self.kept) + 1) / STEPS

    def at(self, t: Array, dtype: Any) -> Step:
        """Constants of the steps at times [b] or at one time, broadcastable against latents.

        Those of a time at which no step is kept are not numbers.
        """
        index = step_of(t)

        def constants(table: np.ndarray) -> Array:
            every = np.full(STEPS, np.nan)
            every[list(self.kept)] = table
            return process.expand(jnp.asarray(every, dtype)[index])

        return Step(*map(constants, self.tables))


def step_of(t: Array) -> Array:
    """The step, from 0, whose time is nearest."""
    return jnp.clip(jnp.round(jnp.asarray(t) * STEPS).astype(jnp.int32) - 1, 0, STEPS - 1)
