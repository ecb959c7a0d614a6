"""Precision and recall of generated features, and their distance to the training set.

Around each point of a set lies a ball that reaches its k-th nearest neighbour in the same set; the
union of the balls stands for the manifold of the set. Precision is the share of generated points
inside the reference manifold, recall the share of reference points inside the generated one
(Kynkaanniemi et al., arXiv 1904.06991).

As in the ADM evaluator, distances and radii are *squared*, from |u|^2 - 2 u.v + |v|^2 floored at 0,
a point counts as its own first neighbour, and a point on the surface of a ball is inside. ADM takes
the distances in float16 where they do not overflow, which moves the result by about half a percent;
here they are float64.

Every function works on blocks of rows, so 10,000 x 50,000 distances never exist at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from ig_jax.metrics.rows import as_rows

BLOCK_DISTANCES = 2**24  # 128 MiB in float64: large enough for BLAS, small beside the features


class PrecisionRecall(NamedTuple):
    """Two shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference: np.ndarray, generated: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Precision and recall of `generated` [m, d] against `reference` [n, d].

    Raises:
      ValueError: dimensions differ, a row is not finite, or a set does not hold more than k points.
    """
    reference, generated = as_rows(reference, "reference"), as_rows(generated, "generated")
    precision = inside_manifold(generated, reference, knn_radii(reference, k)).mean()
    recall = inside_manifold(reference, generated, knn_radii(generated, k)).mean()
    return PrecisionRecall(float(precision), float(recall))


def knn_radii(points: np.ndarray, k: int = 3) -> Float64[np.ndarray, "n"]:
    """Squared distance of each point [n, d] to its k-th nearest other point of the set.

    Raises:
      ValueError: a row is not finite, k is below 1, or there are not more than k points.
    """
    points = as_rows(points, "points")
    if not 1 <= k < len(points):
        raise ValueError(
            f"k = {k} with {len(points)} points: must be at least 1 and below the number of "
            "points; lower k or generate more"
        )
    # The point itself has position 0 in the sort, so its k-th neighbour has position k.
    blocks = _squared_distance_blocks(points, points)
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])


def inside_manifold(
    points: np.ndarray, centres: np.ndarray, radii: Float64[np.ndarray, "m"]
) -> Bool[np.ndarray, "n"]:
    """Whether each point [n, d] lies in a ball around some centre [m, d] with squared radius [m].

    Raises:
      ValueError: dimensions differ, or a row is not finite.
    """
    blocks = _squared_distance_blocks(as_rows(points, "points"), as_rows(centres, "centres"))
    return np.concatenate([(block <= radii).any(axis=1) for block in blocks])


def nearest_distance(queries: np.ndarray, reference: np.ndarray) -> Float64[np.ndarray, "n"]:
    """Euclidean (not squared) distance of each query [n, d] to the nearest reference row [m, d].

    The check for memorised images: an exact copy gives exactly 0.

    Raises:
      ValueError: dimensions differ, a row is not finite, or a set is empty.
    """
    queries, reference = as_rows(queries, "queries"), as_rows(reference, "reference")
    blocks = _squared_distance_blocks(queries, reference)
    nearest = np.concatenate([block.argmin(axis=1) for block in blocks])
    # The expanded square leaves a copy at about 1e-8 of its norm; the plain difference leaves 0.
    return np.linalg.norm(queries - reference[nearest], axis=1)


def _squared_distance_blocks(
    a: Float64[np.ndarray, "n d"], b: Float64[np.ndarray, "m e"]
) -> Iterator[Float64[np.ndarray, "rows m"]]:
    """|a_i - b_j|^2 for consecutive blocks of rows of a, at most BLOCK_DISTANCES values each."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features of dimension {a.shape[1]} and {b.shape[1]} do not compare: "
            "take both sets from the same layer of the same network"
        )
    if len(a) == 0 or len(b) == 0:
        raise ValueError(f"sets of {len(a)} and {len(b)} points: both need at least one")
    norms_b = np.square(b).sum(axis=1)
    block_rows = max(1, BLOCK_DISTANCES // len(b))
    for start in range(0, len(a), block_rows):
        block = a[start : start + block_rows]
        norms_a = np.square(block).sum(axis=1, keepdims=True)
        yield np.maximum(norms_a - 2 * (block @ b.T) + norms_b, 0)
