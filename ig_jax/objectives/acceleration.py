"""Training acceleration by Internal Guidance: the final output is trained towards guidance itself.

  target_final = v + omega * stop_gradient(v_final - v_readout)

It takes the place of the `flow` term, beside an `internal_guidance` term that trains the readout
towards v as ever. At omega = 0 the two are plain auxiliary supervision. With the bias of the
network itself the final output settles where

  v_final - v_readout = (v - v_readout) / (1 - omega),

so it learns what sampling with IG scale 1 / (1 - omega) would extrapolate to, and needs no guidance
for it; omega must stay below 1. The bias may come from the averaged network instead, which is
steadier and costs one more forward pass.

Source: arXiv 2512.24176, section 4.3, where the formula is written for x_0:
x_0 + omega sg(D_final - D_readout). With x_0 = x_t - t v the factors t cancel. The authors did not
release code for it, nor the omega they used; no published number can be reproduced with this term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax import lax

from ig_jax.bounds import below_one
from ig_jax.errors import shown
from ig_jax.objectives.base import NoisedBatch, Term, squared_error
from ig_jax.types import NONE, Params, PerExample

BIASES = ("network", "ema")


@dataclass(frozen=True)
class AcceleratedFlow(Term):
    """Squared error of the final output against the shifted target."""

    omega: float  # 0 is plain flow matching
    bias: str  # whose outputs make the bias: network (the one that trains), ema (its average)
    readout: int = 0  # depth of the early head; 0 where there is only one

    def __post_init__(self):
        super().__post_init__()
        if not below_one(self.omega):
            raise ValueError(
                f"omega = {self.omega}: must lie in [0, 1); at 1 the target runs away from the "
                "output"
            )
        if self.bias not in BIASES:
            raise ValueError(f"bias = {shown(self.bias)}: must be one of {', '.join(BIASES)}")

    def check(self, readouts: tuple[int, ...]) -> None:
        if not readouts:
            raise ValueError(
                "extrapolates from an intermediate readout, but model.readouts is empty; "
                "name a depth there, or use the term flow instead"
            )
        if self.readout not in (readouts if len(readouts) > 1 else (0, *readouts)):
            raise ValueError(
                f"readout = {self.readout}: must be one of model.readouts = {shown(readouts)}"
            )

    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        inputs = batch.x_t, batch.t, batch.y, batch.ids
        out = batch.out if self.bias == "network" else batch.teacher.predict(*inputs)
        early = out.heads[self.readout or next(iter(out.heads))]
        bias = lax.stop_gradient(out.pred - early)
        return squared_error(batch.out.pred, batch.target + self.omega * bias)
