"""The evaluator's protocol, and metrics over runs of one size."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from ig_jax.evaluation.feature_extractor import Rows
from ig_jax.io.row_store import Row


@runtime_checkable
class Evaluator(Protocol):
    """Images or points in, measures out."""

    metrics: tuple[str, ...]  # those that a search may go by, and a table shows
    # Whether a demo also shows what the readout alone would draw.
    shows_readout: bool
    decode: Any  # from latents to what is evaluated; None: the codec's images

    def extract(self, images: np.ndarray) -> Rows: ...

    def rows(self, shape: tuple[int, ...]) -> dict[str, Row]: ...

    def compute(self, rows: Rows, labels: np.ndarray | None) -> dict[str, float]: ...

    def record(self) -> dict[str, Any]: ...


def compute_in_runs(
    evaluator: Evaluator, rows: Rows, labels: np.ndarray | None, size: int
) -> dict[str, float]:
    """All measures, the mean over runs of `size` samples in order; a shorter rest is left out.

    Most measures depend on how many samples there are. A Frechet distance falls with them, whatever
    they are: draws from the training digits' own moments score 1.05 in runs of 355 and 0.22 in runs
    of 1440. So sets of different sizes are compared in runs of one.

    Args:
      rows: what `evaluator.extract` gave, of at least `size` samples.
      labels: [n], or None as for `compute`.
    """
    total = len(next(iter(rows.values())))
    if total < size:
        raise ValueError(f"size = {size}: there are only {total} samples")
    each = [
        evaluator.compute(
            {name: array[start : start + size] for name, array in rows.items()},
            None if labels is None else labels[start : start + size],
        )
        for start in range(0, total - size + 1, size)
    ]
    return {name: float(np.mean([measures[name] for measures in each])) for name in each[0]}


# What an evaluator keeps of real examples that were held out, and their labels.
HeldOut = tuple[Rows, np.ndarray]
