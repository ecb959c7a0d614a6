"""Frechet distance between two Gaussians: FID on Inception features, FD on any others.

  d^2 = |m_a - m_b|^2 + Tr S_a + Tr S_b - 2 Tr (S_a S_b)^(1/2)

(Dowson and Landau 1982; Heusel et al., arXiv 1706.08500). As everywhere in the field the squared
form is what is reported. S_a S_b is not symmetric, so its root is taken through symmetric ones:

  Tr (S_a S_b)^(1/2) = Tr (A S_b A)^(1/2) = sum of the singular values of A B,
  A = S_a^(1/2),  B = S_b^(1/2).

No complex numbers appear, and nothing is added to the diagonal of a singular covariance (fewer
samples than dimensions). The last form is the one computed: taking roots of the eigenvalues of
A S_b A instead would turn a rounding of 1e-16 into 1e-8 in every shared null direction, to save
what the singular values of 2048 x 2048 take longer than eigenvalues: half a second.
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
    roots = _symmetric_root(a.covariance) @ _symmetric_root(b.covariance)
    root_trace = np.linalg.svd(roots, compute_uv=False).sum()
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace
    # A squared metric: what is left below zero is the rounding of near-equal traces.
    return max(float(distance), 0.0)


def _symmetric_root(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(covariance)
    # A covariance has no negative eigenvalue; rounding leaves some of a singular one below zero.
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
