"""Power-function averages of the parameters, and those of any length, after training.

With exponent g the average after update t weights the parameters after update s by s^g: it reaches
back a constant share of the training, and forgets the initial weights at once (Karras et al. 2024,
arXiv 2312.02696, section 3). `sigma_rel`, the standard deviation of that weighting over t, is how
lengths are named: 0.05 is g = 16.97, 0.10 is g = 6.94. From averages of two lengths, stored now and
then, that of another length, at one of those steps, is composed by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

SHORTEST, LONGEST = 0.005, 0.25  # of sigma_rel


class Profile(NamedTuple):
    """An average: its length, and the updates done when it was taken."""

    sigma_rel: float
    step: int


def exponent(sigma_rel: float) -> float:
    """The g of a length: the root of (g + 1) / ((g + 2)^2 (g + 3)) = sigma_rel^2 (equation 3)."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def share_of_new(sigma_rel: float, step: Array | int) -> Array:
    """Share of the average that the parameters get after one more update than `step`.

    It is 1 - (1 - 1 / t)^(g + 1) with t = step + 1 (equation 2). As written it would lose all its
    digits but two after a million updates, in float32.
    """
    return -jnp.expm1((exponent(sigma_rel) + 1) * jnp.log1p(-1 / (step + 1)))


def inner_product(a: Profile, b: Profile) -> float:
    """Of the weightings of two averages, as functions of the update (appendix C.2)."""
    earlier, later = sorted((a, b), key=lambda profile: profile.step)
    g, h = exponent(earlier.sigma_rel), exponent(later.sigma_rel)
    overlap = (earlier.step / later.step) ** h / later.step
    return (g + 1) * (h + 1) / (g + h + 1) * overlap


class Composition(NamedTuple):
    """An average as a sum of stored ones.

    Attributes:
      coefficients: float64 [n], one for each stored average.
      error: root mean square of what its weighting misses, relative to the weighting itself.
    """

    coefficients: np.ndarray
    error: float


def compose(stored: Sequence[Profile], wanted: Profile) -> Composition:
    """The sum of stored averages whose weighting is nearest the wanted one (algorithm 3).

    Unlike there, the coefficients sum to 1, so that what training leaves alone, such as a table of
    positions, stays as it is.
    """
    products = np.array([[inner_product(a, b) for a in stored] for b in stored])
    targets = np.array([inner_product(a, wanted) for a in stored])
    # Scaled to a diagonal of 1: weightings of early steps are larger by orders of magnitude.
    scale = 1 / np.sqrt(np.diag(products))
    scaled, sums = products * np.outer(scale, scale), scale / np.linalg.norm(scale)
    system = np.block([[scaled, sums[:, None]], [sums, 0]])  # with a Lagrange multiplier
    goal = np.append(targets * scale, 1 / np.linalg.norm(scale))
    solved, *_ = np.linalg.lstsq(system, goal, rcond=1e-13)
    coefficients = solved[:-1] * scale
    own = inner_product(wanted, wanted)
    missed = own - 2 * coefficients @ targets + coefficients @ products @ coefficients
    return Composition(coefficients, float(np.sqrt(max(missed, 0) / own)))
