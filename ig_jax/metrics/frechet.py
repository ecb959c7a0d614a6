"""Frechet distance between two Gaussians: FID on Inception features, FD on any others.

  d^2 = |m_a - m_b|^2 + Tr S_a + Tr S_b - 2 Tr (S_a S_b)^(1/2)

(Dowson and Landau 1982; Heusel et al., arXiv 1706.08500). As everywhere in the field the squared
form is what is reported. S_a S_b is not symmetric, so its root is taken through factors of both:

  Tr (S_a S_b)^(1/2) = sum of the singular values of A^T B,   S_a = A A^T,  S_b = B B^T.

A factor is made of the eigenvectors, without those whose eigenvalue is zero but for rounding (fewer
samples than dimensions): they cost time and add nothing. No complex numbers appear, and nothing is
added to the diagonal of a singular covariance. Taking roots of eigenvalues of A^T S_b A instead
would turn a rounding of 1e-16 into 1e-8 in every shared null direction.
"""

import numpy as np
from jaxtyping import Float64

from ig_jax.metrics.moments import Gaussian, require_same_dimension


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance between a and b; never negative.

    Raises:
      ValueError: the dimensions differ.
    """
    require_same_dimension(a, b)
    shift = a.mean - b.mean
    between = factor(a.covariance).T @ factor(b.covariance)
    root_trace = np.linalg.svd(between, compute_uv=False).sum()
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace
    # A squared metric: what is left below zero is the rounding of near-equal traces.
    return max(float(distance), 0.0)


def factor(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d r"]:
    """F with F F^T = covariance, r its rank."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * values[-1]
    kept = values > rounding
    return vectors[:, kept] * np.sqrt(values[kept])
