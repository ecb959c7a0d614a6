"""The Adams-Bashforth method of two steps on the probability flow.

  x <- x + (t_next - t) (v + (t - t_next) / (2 (t_before - t)) (v - v_before))

Exact, from the second step on, where the velocity along the way is linear in time; the last step is
like every other. Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I,
section III.1, and III.5 for steps of different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

from ig_jax.samplers.multistep import Multistep, Past, in_the_middle
from ig_jax.types import Field, Latents, Scalar


@dataclass(frozen=True)
class AdamsBashforth(Multistep):
    """Second order, one evaluation a step: the velocity of the step before is used again."""

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, past: Past
    ) -> tuple[Latents, Past]:
        now = Past(t, field.velocity(x, t).astype(x.dtype))
        return x + (t_next - t) * in_the_middle(past, now, t_next), now

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar, past: Past) -> Latents:
        return self.step(field, x, t, t_next, past)[0]
