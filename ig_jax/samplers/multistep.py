"""Samplers that read the step before: second order for one evaluation a step.

What is evaluated at a step, f at a position p that falls from noise to data, is carried on in a
line to the middle of the step:

  f + (p - p_next) / (2 (p_before - p)) (f - f_before)

Steps of any lengths may follow each other. The first step has nothing before it and takes f as it
is, which makes it one of first order. So does the first step after a guidance has switched on or
off (`base.integrate`): f_before belongs to another field, and the jump between the two is no slope.
An error of O(h^2) in a few steps leaves the second order of the whole.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from ig_jax.samplers.base import FixedGrid
from ig_jax.types import Field, Latents, Scalar


class Past(NamedTuple):
    """State that a step leaves to the next one."""

    at: Scalar  # position; where it is infinite nothing is read
    value: Latents  # evaluated there


def in_the_middle(past: Past, now: Past, there: Scalar) -> Latents:
    """What is evaluated, carried on to the middle between now and `there`."""
    reach = (now.at - there) / (2 * (past.at - now.at))
    weight = jnp.where(jnp.isfinite(past.at), reach, 0)
    return now.value + weight * (now.value - past.value)


@dataclass(frozen=True)
class Multistep(FixedGrid):
    """A fixed grid; a step takes the `Past` in place of noise, and all but the last leave one."""

    order: ClassVar[int] = 2
    multistep: ClassVar[bool] = True

    def nothing(self, x: Latents) -> Past:
        """The past of a first step."""
        return Past(jnp.full((), jnp.inf, x.dtype), jnp.zeros_like(x))

    @abstractmethod
    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, past: Past
    ) -> tuple[Latents, Past]: ...

    @abstractmethod
    def last_step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, past: Past
    ) -> Latents: ...
