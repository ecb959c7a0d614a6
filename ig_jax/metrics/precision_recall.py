"""Precision and recall of generated features, and their distance to the training set.

Around each point of a set lies a ball that reaches its k-th nearest neighbour in the same set; the
union of the balls stands for the manifold of the set. Precision is the share of generated points
inside the reference manifold, recall the share of reference points inside the generated one
(Kynkaanniemi et al., arXiv 1904.06991).

As in the ADM evaluator, distances and radii are *squared*, from |u|^2 - 2 u.v + |v|^2 floored at 0,
a point counts as its own first neighbour, and a point on the surface of a ball is inside. ADM takes
the distances in float16 where they do not overflow, which moves the result by about half a percent;
here they are float32, and the products of the highest precision that the device has. The expanded
square rounds at the size of the norms, however near two points are, so both sets are first moved
by the mean of the reference, in float64: no distance changes, but the norms shrink to the spread.

Every local device takes its part of the rows, against a whole copy of the other set, in blocks:
50,000 x 50,000 distances never exist at once.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Float64, Shaped

from ig_jax.metrics.checked_rows import BLOCK_ROWS, row_blocks

BLOCK_DISTANCES = 2**25  # at once on a device; 128 MiB: large enough for the matrix units
_ROWS, _WHOLE = PartitionSpec("rows"), PartitionSpec()


class PrecisionRecall(NamedTuple):
    """Two shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference: np.ndarray, generated: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Precision and recall of `generated` [m, d] against `reference` [n, d].

    Raises:
      ValueError: dimensions differ, a row is not finite, or a set does not hold more than k points.
    """
    reference, generated = _centred(reference=reference, generated=generated)
    precision = _inside(generated, reference, _radii(reference, k)).mean()
    recall = _inside(reference, generated, _radii(generated, k)).mean()
    return PrecisionRecall(float(precision), float(recall))


def knn_radii(points: np.ndarray, k: int = 3) -> Float32[np.ndarray, "n"]:
    """Squared distance of each point [n, d] to its k-th nearest other point of the set.

    Raises:
      ValueError: a row is not finite, k is below 1, or there are not more than k points.
    """
    (points,) = _centred(points=points)
    return _radii(points, k)


def inside_manifold(
    points: np.ndarray, centres: np.ndarray, radii: Float[np.ndarray, "m"]
) -> Bool[np.ndarray, "n"]:
    """Returns whether points [n, d] lie in a ball around some centre [m, d], squared radii [m].

    Raises:
      ValueError: dimensions differ, or a row is not finite.
    """
    centres, points = _centred(centres=centres, points=points)
    return _inside(points, centres, radii.astype(np.float32))


def nearest_distance(queries: np.ndarray, reference: np.ndarray) -> Float64[np.ndarray, "n"]:
    """Euclidean (not squared) distance of each query [n, d] to the nearest reference row [m, d].

    The check for memorised images: an exact copy gives exactly 0, unless some other row lies so
    near to it (about 1e-3 of the spread) that float32 cannot tell which of the two is nearer.

    Raises:
      ValueError: dimensions differ, a row is not finite, or a set is empty.
    """
    moved_reference, moved_queries = _centred(reference=reference, queries=queries)
    nearest = reference[_by_rows(jnp.argmin, moved_queries, moved_reference)]
    # The expanded square leaves a copy at its rounding; the plain difference leaves 0.
    blocks = [row_blocks(rows, "queries", BLOCK_ROWS) for rows in (queries, nearest)]
    return np.concatenate([np.linalg.norm(a - b, axis=1) for a, b in zip(*blocks, strict=True)])


def _centred(**sets: np.ndarray) -> list[Float32[np.ndarray, "_ d"]]:
    """The sets, moved together so that the first has mean 0; errors call them by their names."""
    for name, values in sets.items():
        if len(values) == 0:
            raise ValueError(f"{name} holds no points: needs at least one")
    first, values = next(iter(sets.items()))
    sums = [block.sum(axis=0) for block in row_blocks(values, first, BLOCK_ROWS)]
    centre = sum(sums) / len(values)
    return [_moved(values, name, centre) for name, values in sets.items()]


def _moved(
    values: np.ndarray, name: str, centre: Float64[np.ndarray, "d"]
) -> Float32[np.ndarray, "n d"]:
    moved = []
    for block in row_blocks(values, name, BLOCK_ROWS):
        if block.shape[1] != len(centre):
            raise ValueError(
                f"features of dimension {len(centre)} and {block.shape[1]} do not compare: "
                "take both sets from the same layer of the same network"
            )
        moved.append((block - centre).astype(np.float32))
    return np.concatenate(moved)


def _radii(points: Float32[np.ndarray, "n d"], k: int) -> Float32[np.ndarray, "n"]:
    if not 1 <= k < len(points):
        raise ValueError(
            f"k = {k} with {len(points)} points: must be at least 1 and below the number of "
            "points; lower k or generate more"
        )
    return _by_rows(_kth_smallest(k), points, points)


def _inside(
    points: Float32[np.ndarray, "n d"],
    centres: Float32[np.ndarray, "m d"],
    radii: Float32[np.ndarray, "m"],
) -> Bool[np.ndarray, "n"]:
    return _by_rows(_any_within, points, centres, radii)


# Of the squared distances [m] of one row


@functools.cache  # one function for one k, so that its compiled program is found again
def _kth_smallest(k: int) -> Callable[[Array], Array]:
    def reduce(distances):
        places = jnp.arange(distances.size)
        # The point itself is the smallest. Some versions of jax would sort whole rows for top_k.
        for _ in range(k):
            distances = jnp.where(places == distances.argmin(), jnp.inf, distances)
        return distances.min()

    return reduce


def _any_within(distances: Float32[Array, "m"], radii: Float32[Array, "m"]) -> Bool[Array, ""]:
    return (distances <= radii).any()


# On the devices


def _by_rows(
    reduce: Callable[..., Array], rows: Float32[np.ndarray, "n d"], *whole: np.ndarray
) -> np.ndarray:
    """`_reduced` with the rows shared among the local devices, and a copy of `whole` on each."""
    mesh = Mesh(np.array(jax.local_devices()), "rows")
    block = max(1, BLOCK_DISTANCES // len(whole[0]))
    filled = np.pad(rows, ((0, -len(rows) % mesh.size), (0, 0)))
    shared = jax.device_put(filled, NamedSharding(mesh, _ROWS))
    copies = jax.device_put(whole, NamedSharding(mesh, _WHOLE))
    return np.asarray(_reduced(reduce, mesh, block, shared, *copies))[: len(rows)]


@functools.partial(jax.jit, static_argnames=("reduce", "mesh", "block"))
def _reduced(
    reduce: Callable[..., Array],
    mesh: Mesh,
    block: int,
    rows: Float32[Array, "n d"],
    points: Float32[Array, "m d"],
    *more: Array,
) -> Shaped[Array, "n"]:
    """reduce(squared distances to all points [m], *more) of every row, `block` rows at a time."""

    def on_one_device(rows, points, *more):
        norms = jnp.square(points).sum(axis=1)

        def of_row(row):
            products = jnp.matmul(row, points.T, precision=lax.Precision.HIGHEST)
            distances = jnp.square(row).sum() - 2 * products + norms
            return reduce(jnp.maximum(distances, 0), *more)

        return lax.map(of_row, rows, batch_size=block)

    each = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=(_ROWS, *[_WHOLE] * (1 + len(more))), out_specs=_ROWS
    )
    return each(rows, points, *more)
