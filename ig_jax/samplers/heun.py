"""Heun's method on the probability flow: Euler predicts, the average of both slopes corrects.

The last step is Euler's, as in EDM (arXiv 2206.00364, algorithm 1) and the published SiT sampler.
Both evaluations of a step use that step's field, so a guidance interval is tested at the first time
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ig_jax.samplers import base
from ig_jax.types import Field, Latents, Scalar


@dataclass(frozen=True)
class Heun:
    """Second order, two evaluations a step (one in the last), uniform grid."""

    num_steps: int

    order: ClassVar[int] = 2
    calls_per_step: ClassVar[int] = 2

    def __post_init__(self):
        base.require_steps(self.num_steps, least=1)

    def grid(self) -> np.ndarray:
        return np.linspace(1.0, 0.0, self.num_steps + 1)

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents | None = None
    ) -> Latents:
        slope = field.velocity(x, t)
        slope_next = field.velocity(x + (t_next - t) * slope, t_next)
        return x + (t_next - t) * 0.5 * (slope + slope_next)

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents:
        return x + (t_next - t) * field.velocity(x, t)
