"""Mean and covariance of features, gathered batch by batch in float64.

A `Moments` holds n, the mean m and the centred scatter S = sum_i (x_i - m)(x_i - m)^T. Two of them
merge without a look at the rows (Chan, Golub, LeVeque 1983, pairwise update):

  n = n_a + n_b,   delta = m_b - m_a,   m = m_a + delta n_b / n,
  S = S_a + S_b + delta delta^T n_a n_b / n.

The sums of x and x x^T would merge as easily, but their difference loses every digit once the mean
is large beside the spread; the centred form loses none.

A `Gaussian` is what remains when the count is forgotten, and all that published statistics hold.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from ig_jax.metrics.checked_rows import BLOCK_ROWS, row_blocks


class Gaussian(NamedTuple):
    """Mean and unbiased covariance of a set of feature vectors."""

    mean: Float64[np.ndarray, "d"]
    covariance: Float64[np.ndarray, "d d"]


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and centred scatter of a set of feature vectors."""

    count: int
    mean: Float64[np.ndarray, "d"]
    scatter: Float64[np.ndarray, "d d"]

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """The neutral element of `merge`."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def from_features(cls, features: np.ndarray) -> "Moments":
        """Moments of features [n, d], any real dtype; n = 0 gives `empty`.

        They are read in blocks of rows, so that a memory-mapped file is never in memory at once.

        Raises:
          ValueError: features is not [n, d], or a row holds NaN or infinity (the first is named).
        """
        blocks = row_blocks(features, "features", BLOCK_ROWS)
        return functools.reduce(cls.merge, (cls._from_block(block) for block in blocks))

    @classmethod
    def _from_block(cls, rows: Float64[np.ndarray, "n d"]) -> "Moments":
        if len(rows) == 0:
            return cls.empty(rows.shape[1])
        mean = rows.mean(axis=0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together.

        Raises:
          ValueError: the two have different dimensions.
        """
        require_same_dimension(self, other)
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Float64[np.ndarray, "d d"]:
        """Unbiased covariance, scatter / (count - 1).

        Raises:
          ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(
                f"covariance of {self.count} samples: needs at least 2; merge more batches first"
            )
        return self.scatter / (self.count - 1)

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance alone.

        Raises:
          ValueError: fewer than two samples.
        """
        return Gaussian(self.mean, self.covariance)


def require_same_dimension(a: Moments | Gaussian, b: Moments | Gaussian) -> None:
    """Raises ValueError, naming both dimensions, unless a and b describe the same feature space."""
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"features of dimension {len(a.mean)} and {len(b.mean)} do not compare: "
            "take both sets from the same layer of the same network"
        )
