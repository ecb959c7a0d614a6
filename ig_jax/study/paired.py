"""Means over training seeds, and differences between runs of the same seed, with 95 % intervals.

Runs of one seed share initial weights as far as their networks are the same, the order of the data,
noise and times. A difference taken seed by seed loses the spread that they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values, and half the width of its Student t interval; nan of one value."""

    mean: float
    half: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, such as those of several training seeds.

    mean +- t(n - 1) s / sqrt(n), with the (1 + LEVEL) / 2 quantile t of Student's distribution and
    the standard deviation s of a sample (n - 1).
    """
    n, values = len(values), np.asarray(values, np.float64)
    if n == 1:
        return Interval(float(values[0]), math.nan, 1)
    from scipy.special import stdtrit  # a tenth of what all programs import, for two of them

    t = stdtrit(n - 1, (1 + LEVEL) / 2)
    half = t * values.std(ddof=1) / math.sqrt(n)
    return Interval(float(values.mean()), float(half), n)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean of values - baseline, both in the same order of seeds."""
    return interval([a - b for a, b in zip(values, baseline, strict=True)])
