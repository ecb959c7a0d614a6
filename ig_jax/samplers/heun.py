"""Heun's method on the probability flow: Euler predicts, the average of both slopes corrects.

Two published forms differ in two choices, and so do the two classes:

                          Heun                                    Heun2
  last step               Euler's (EDM, arXiv 2206.00364)         corrected like every other
  second evaluation       guided as at the step's first time      guided as at its own time
  used by                 SiT and its IG code                     LightningDiT (torchdiffeq's heun2)

The second choice matters only in the step that the end of a guidance interval falls into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ig_jax.samplers.base import FixedGrid
from ig_jax.types import Field, Latents, Scalar


@dataclass(frozen=True)
class Heun(FixedGrid):
    """Second order, two evaluations a step and one in the last."""

    order: ClassVar[int] = 2
    calls_per_step: ClassVar[int] = 2

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents | None = None
    ) -> Latents:
        slope = field.velocity(x, t)
        at_end = field.velocity_at_end or field.velocity
        slope_next = at_end(x + (t_next - t) * slope, t_next)
        return x + (t_next - t) * 0.5 * (slope + slope_next)


@dataclass(frozen=True)
class Heun2(Heun):
    """Second order, two evaluations in every step."""

    guided_at_end: ClassVar[bool] = True
    calls_in_last: ClassVar[int] = 2

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents:
        return self.step(field, x, t, t_next)
