"""A part of a data set, and a data set in two parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ig_jax.types import Source

ENOUGH = 1000  # examples to choose by: accuracies then differ by chance by a point or two
MOST = 0.2  # of a data set that has fewer than that can be spared from


def every_nth_of_class(labels: np.ndarray, n: int) -> np.ndarray:
    """Mask of the n-th, 2n-th, ... example of each class, in their order: a fixed held-out part."""
    rank = np.zeros(len(labels), int)  # position of each example among its class
    for label in np.unique(labels):
        rank[labels == label] = np.arange(np.sum(labels == label))
    return rank % n == n - 1


@dataclass(frozen=True, eq=False)
class Subset:
    """The examples of a source that have the given indices, in their order."""

    source: Source
    indices: np.ndarray

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.source.stored_shape

    @property
    def stored_dtype(self) -> Any:
        return self.source.stored_dtype

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.indices)

    def held_out(self) -> Source | None:
        return self.source.held_out()

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.source.batch(self.indices[np.asarray(indices)])


def split(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """A source in two parts at random: the larger one, and about `share` of it to validate with.

    That is raised to `ENOUGH` examples, or to the share `MOST` where there are few. The parts
    depend on the size of the source and the seed alone.

    Raises:
      ValueError: there are no two examples.
    """
    total = len(source)
    if total < 2:
        raise ValueError(f"holds {total} examples: two parts need at least two")
    wanted = max(share * total, min(ENOUGH, MOST * total))
    count = min(max(1, round(wanted)), total - 1)
    order = np.random.default_rng(seed).permutation(total)
    return Subset(source, order[count:]), Subset(source, order[:count])
