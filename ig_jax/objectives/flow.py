"""Flow matching: squared error of the final velocity (SiT, arXiv 2401.08740, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ig_jax.objectives.base import NoisedBatch, Term
from ig_jax.types import NONE, Params, PerExample, PerToken


@dataclass(frozen=True)
class FlowMatching(Term):
    def __call__(
        self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()
    ) -> PerExample | PerToken:
        return batch.squared_error(batch.out.pred)
