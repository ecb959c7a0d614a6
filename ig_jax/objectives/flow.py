"""Flow matching: squared error of the final velocity (SiT, arXiv 2401.08740, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

from ig_jax.objectives.base import NoisedBatch, require_weight, squared_error
from ig_jax.types import PerExample


@dataclass(frozen=True)
class FlowMatching:
    weight: float

    def __post_init__(self):
        require_weight(self.weight)

    def check(self, readouts: tuple[int, ...]) -> None:
        pass  # reads only the final prediction, which every network has

    def __call__(self, p: NoisedBatch) -> PerExample:
        return squared_error(p.out.pred, p.target)
