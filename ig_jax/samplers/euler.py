"""Euler's method on the probability flow: x <- x + (t_next - t) v(x, t)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ig_jax.samplers import base
from ig_jax.types import Field, Latents, Scalar


@dataclass(frozen=True)
class Euler:
    """First order, one evaluation a step, uniform grid."""

    num_steps: int

    order: ClassVar[int] = 1
    calls_per_step: ClassVar[int] = 1

    def __post_init__(self):
        base.require_steps(self.num_steps, least=1)

    def grid(self) -> np.ndarray:
        return np.linspace(1.0, 0.0, self.num_steps + 1)

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents | None = None
    ) -> Latents:
        return x + (t_next - t) * field.velocity(x, t)

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents:
        return self.step(field, x, t, t_next)
