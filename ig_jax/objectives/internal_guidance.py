"""Internal Guidance: every intermediate readout is trained on the same target as the final output.

  L = L_final + 0.5 L_readout      (arXiv 2512.24176; the weight is a literal in the published code)

That is all the training half of IG is; the other half is `guidance.internal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ig_jax.objectives.base import NoisedBatch, Term
from ig_jax.types import NONE, Params, PerExample, PerToken


@dataclass(frozen=True)
class InternalGuidance(Term):
    """Squared error of every readout; `weight` is that of the sum over them."""

    def check(self, readouts: tuple[int, ...]) -> None:
        if not readouts:
            raise ValueError(
                "trains intermediate readouts, but model.readouts is empty; "
                "name a depth there, or remove this term"
            )

    def __call__(
        self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()
    ) -> PerExample | PerToken:
        return sum(batch.squared_error(early) for early in batch.out.heads.values())
