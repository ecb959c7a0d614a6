"""Evaluation of samples of a toy whose density is known: no classifier, no reference images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ig_jax.evaluation.feature_extractor import Rows
from ig_jax.io.row_store import Row
from ig_jax.metrics.precision_recall import precision_recall
from ig_jax.plots import density_panels
from ig_jax.types import Latents

FLOOR = "held-out data"  # how real data are called in tables and images
RECALL_POINTS = 2000  # the k-NN balls of more points hardly differ


@dataclass(frozen=True)
class DensityEvaluator:
    """A source with `outliers(points [n, 2], labels [n])` and held-out points."""

    source: Any
    held_out: Any

    metrics: ClassVar[tuple[str, ...]] = ("outliers", "recall")
    # Also what the readout alone would draw.
    shows_readout: ClassVar[bool] = True

    def decode(self, x: Latents) -> Latents:
        """Points stay as they are."""
        return x

    def extract(self, samples: np.ndarray) -> Rows:
        """The points [n, 2] of samples [n, 1, 1, 2]."""
        return {"points": samples.reshape(len(samples), 2)}

    def rows(self, shape: tuple[int, ...]) -> dict[str, Row]:
        return {"points": Row((2,), np.float32)}

    def compute(self, rows: Rows, labels: np.ndarray) -> dict[str, float]:
        """All measures of points that are meant to be of classes `labels` [n].

        outliers: share below the 1 % quantile of their class's density.
        recall: share of training points among the samples' nearest neighbours (k = 3).
        """
        points = rows["points"]
        real = self.source.batch(np.arange(RECALL_POINTS))["stored"].reshape(-1, 2)
        pr = precision_recall(real, points[:RECALL_POINTS])
        return {"outliers": self.source.outliers(points, labels), "recall": pr.recall}

    def record(self) -> dict[str, Any]:
        """Everything that the metrics depend on, besides the samples."""
        return {"points_of_recall": RECALL_POINTS, "k": 3}

    def draw(
        self,
        path: Path,
        drawn: Mapping[str, tuple[np.ndarray, np.ndarray]],
        results: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """The samples of every way over the density, with their outlier rates, as PNG."""
        real = self.held_out.batch(np.arange(len(next(iter(drawn.values()))[1])))
        named = {FLOOR: (real["stored"], real["label"]), **drawn}
        points = {name: (p.reshape(-1, 2), labels) for name, (p, labels) in named.items()}
        rates = {name: results[name]["outliers"]["mean"] for name in points}
        density_panels.draw(path, self.source, points, rates)
