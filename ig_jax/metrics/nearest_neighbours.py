"""Classification by the nearest neighbours among features of known classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def unit_length(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows divided by their length; zeros stay zeros."""
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.where(length > 0, length, 1)


def vote(
    queries: Float[Array, "b d"],
    bank: Float[Array, "n d"],
    labels: Int[Array, "n"],
    *,
    k: int,
    num_classes: int,
) -> Int[Array, "b"]:
    """The most frequent class among the k nearest rows of the bank, by cosine similarity.

    Every neighbour has one vote; of classes with equally many the lowest is taken, and of equally
    near rows the first. So it does as scikit-learn's KNeighborsClassifier.

    Args:
      queries, bank: as `unit_length` gives them.
      labels: of the bank, below `num_classes`.
      k: at most n.
    """
    similarity = jnp.matmul(queries, bank.T, precision=lax.Precision.HIGHEST)
    _, nearest = lax.top_k(similarity, k)
    votes = jax.nn.one_hot(labels[nearest], num_classes).sum(axis=1)
    return jnp.argmax(votes, axis=-1)
