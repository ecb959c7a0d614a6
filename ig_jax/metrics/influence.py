"""Influences of single samples on a metric, and standard errors: the infinitesimal jackknife.

A metric of n samples changes by u_i / n, to first order, where sample i counts a little more; its
standard error is then the standard deviation of u over sqrt(n) (Jaeckel 1972; Efron 1982). Unlike
a bootstrap it draws nothing and costs one pass. It tells how far another n samples of the same
network would move the metric, not the bias that all sets of n share.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from ig_jax.metrics.checked_rows import BLOCK_ROWS, row_blocks
from ig_jax.metrics.frechet import factor
from ig_jax.metrics.inception_score import divergences
from ig_jax.metrics.moments import Gaussian, Moments


def standard_error(influences: np.ndarray) -> float:
    """Of a metric whose samples have these influences [n]; of a share, members as 0 and 1."""
    return float(np.std(influences) / np.sqrt(len(influences)))


def of_frechet_distance(real: Gaussian, features: np.ndarray) -> Float64[np.ndarray, "n"]:
    """Influences of features [n, d] on their squared Frechet distance to `real`.

      u(x) = 2 (m - m_r)^T (x - m) + (x - m)^T (I - T) (x - m) - tr((I - T) S),
      T = A (A^T S A)^(-1/2) A^T,  S_r = A A^T

    T is the map that carries the samples' Gaussian to the real one; it is the derivative of the
    trace of the root.

    Raises:
      ValueError: there are not twice as many samples as features: S may have no inverse.
    """
    n, d = features.shape
    if n < 2 * d:
        raise ValueError(f"{n} samples of {d} features: needs twice as many samples")
    own = Moments.from_features(features).gaussian
    a = factor(real.covariance)
    values, vectors = np.linalg.eigh(a.T @ own.covariance @ a)
    root = a @ vectors / np.maximum(values, np.finfo(np.float64).tiny) ** 0.25
    curvature = np.eye(d) - root @ root.T
    influences = []
    for block in row_blocks(features, "features", BLOCK_ROWS):
        centred = block - own.mean
        squares = np.einsum("nd,nd->n", centred @ curvature, centred)
        influences.append(2 * centred @ (own.mean - real.mean) + squares)
    every = np.concatenate(influences)
    return every - np.trace(curvature @ own.covariance)


def of_inception_score(logits: np.ndarray) -> Float64[np.ndarray, "n"]:
    """Influences of logits [n, classes] on the inception score of all of them together.

    They are score * (D_i - mean D), D_i the divergence of image i's classes from the mean's; what
    it changes in the mean adds nothing to first order.
    """
    divergence = divergences(logits.astype(np.float64))
    return np.exp(divergence.mean()) * (divergence - divergence.mean())
