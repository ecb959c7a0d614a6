"""Internal Guidance: every intermediate readout is trained on the same target as the final output.

  L = L_final + 0.5 L_readout      (arXiv 2512.24176; the weight is a literal in the published code)

That is all the training half of IG is; the other half is `guidance.internal`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ig_jax.objectives.base import NoisedBatch, require_weight, squared_error
from ig_jax.types import PerExample


@dataclass(frozen=True)
class InternalGuidance:
    weight: float  # of the sum over readouts

    def __post_init__(self):
        require_weight(self.weight)

    def check(self, readouts: tuple[int, ...]) -> None:
        if not readouts:
            raise ValueError(
                "trains intermediate readouts, but model.readouts is empty; "
                "name a depth there, or remove this term"
            )

    def __call__(self, p: NoisedBatch) -> PerExample:
        return sum(squared_error(early, p.target) for early in p.out.heads.values())
