"""Euler's method on the probability flow: x <- x + (t_next - t) v(x, t)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ig_jax.samplers.base import FixedGrid
from ig_jax.types import Field, Latents, Scalar


@dataclass(frozen=True)
class Euler(FixedGrid):
    """First order, one evaluation a step."""

    order: ClassVar[int] = 1

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents | None = None
    ) -> Latents:
        return x + (t_next - t) * field.velocity(x, t)
