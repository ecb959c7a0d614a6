"""Dormand-Prince on the probability flow: fifth order, steps chosen by the error they make.

Every sample has steps of its own, so that it does not depend on the batch it is drawn in. The grid
holds the ends of the guidance intervals, so the solver never meets a jump, and never steps beyond
t = 0. (The published LightningDiT lets torchdiffeq overshoot the end and interpolate back, with IG
off out there: errors of 0.03 to 0.1 at its own tolerances, against 0.001 here.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from ig_jax.bounds import at_most
from ig_jax.samplers.base import MOST_STEPS
from ig_jax.types import Field, Latents, Scalar


@dataclass(frozen=True)
class Dopri5:
    """Adaptive, six evaluations an accepted or rejected step."""

    # At most; a sample that needs more is not a number.
    num_steps: int = at_most(MOST_STEPS)
    rtol: float = 1e-3
    atol: float = 1e-6

    order: ClassVar[int] = 5
    adaptive: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    multistep: ClassVar[bool] = False
    guided_at_end: ClassVar[bool] = False
    process: ClassVar[type | None] = None
    reads_variance: ClassVar[bool] = False

    def __post_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps = {self.num_steps}: must be at least 1")
        for name in ("rtol", "atol"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")

    def grid(self) -> np.ndarray:
        return np.array([1.0, 0.0])

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents | None = None
    ) -> Latents:
        """Solves from t to t_next in as many steps as the tolerances ask for."""
        # Imported here because it takes a third of a second that other samplers need not pay.
        import diffrax

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, _: field.velocity(x, t)),
            diffrax.Dopri5(),
            t0=t,
            t1=t_next,
            dt0=None,
            y0=x,
            stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
            max_steps=self.num_steps,
            throw=False,
        )
        done = solution.result == diffrax.RESULTS.successful
        return jnp.where(done, solution.ys[-1], jnp.nan)

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents:
        return self.step(field, x, t, t_next)
