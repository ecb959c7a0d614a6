"""A toy whose answer is known: points of two classes on a tree in the plane, with exact density.

Guidance papers explain themselves on such densities (autoguidance, arXiv 2406.02507); this one is
our own. A point is a 1x1 'image' of two channels: x and y.

Construction. A branch is a circular arc: it starts at a place with a heading, along its length the
heading turns by a bend, and its width shrinks evenly to WIDTH_RATIO of itself. Class 1 is a
straight upright stem, a limb that leaves the end of the stem to the right, and all that grows from
the limb: GENERATIONS - 1 times every end forks into an outer and an inner child, which start as
wide as their parent ends. Class 0 is the mirror image, so the two share the stem and nothing else.

A branch becomes a row of round Gaussians. Their standard deviation is the width there and their
distance at most one standard deviation, which makes the row smooth to 1e-8; their weight is
distance x width, which makes the density along all ridges the same. At last both classes together,
equally frequent, are moved to mean 0 and scaled to a mean square of 1 over both coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32

from ig_jax.errors import shown

_SIZES = {"train": 20_000, "held_out": 10_000}
_SEEDS = {"train": 0, "held_out": 1, "threshold": 2}
THRESHOLD_POINTS = 200_000  # 1 % of them is known to 0.02 %

# Lengths and widths are in stem lengths, angles in degrees, to the right of upright or of before.
STEM_WIDTH = 0.036
WIDTH_RATIO = 0.88
GENERATIONS = 3  # limb, boughs, twigs
LIMB = (0.88, 13.0, 35.0)  # length, turn where it starts, bend along it
FORK = (  # length relative to the parent, turn, bend
    (0.80, 34.0, -14.0),  # outer child
    (0.74, -32.0, 12.0),  # inner child
)

ROWS_AT_ONCE = 1024  # points whose distances to all Gaussians are held at a time


class Branch(NamedTuple):
    """An arc in the complex plane, x + iy."""

    start: complex
    heading: float  # where it starts
    length: float
    bend: float
    width: float  # where it starts

    def at(self, part: float | np.ndarray) -> complex | np.ndarray:
        """The place that this part (0..1) of the length leads to: the chord of a shorter arc."""
        bend = np.deg2rad(part * self.bend)
        chord = part * self.length * np.sinc(bend / (2 * np.pi))
        return self.start + 1j * chord * np.exp(-1j * (np.deg2rad(self.heading) + bend / 2))

    def child(self, length: float, turn: float, bend: float) -> Branch:
        heading = self.heading + self.bend + turn
        return Branch(self.at(1.0), heading, length, bend, self.width * WIDTH_RATIO)


class Mixture(NamedTuple):
    """Round Gaussians."""

    means: Float64[np.ndarray, "k 2"]
    widths: Float64[np.ndarray, "k"]  # standard deviations
    weights: Float64[np.ndarray, "k"]  # of sum 1


def _grow(branch: Branch, generations: int) -> Iterator[Branch]:
    """The branch and all that grows from it."""
    yield branch
    if generations > 1:
        for ratio, turn, bend in FORK:
            yield from _grow(branch.child(ratio * branch.length, turn, bend), generations - 1)


def _row(branch: Branch) -> np.ndarray:
    """The Gaussians of a branch, a line each: x, y, width, weight before normalising."""
    n = int(np.ceil(branch.length / (branch.width * WIDTH_RATIO)))
    part = (np.arange(n) + 0.5) / n
    place = branch.at(part)
    width = branch.width * (1 - (1 - WIDTH_RATIO) * part)
    return np.stack([place.real, place.imag, width, width * branch.length / n], axis=1)


@cache
def _right_half() -> Mixture:
    """Class 1, moved and scaled as the module says."""
    stem = Branch(0j, heading=0.0, length=1.0, bend=0.0, width=STEM_WIDTH)
    branches = [stem, *_grow(stem.child(*LIMB), GENERATIONS)]
    x, y, width, weight = np.concatenate([_row(branch) for branch in branches]).T
    weight = weight / weight.sum()
    # The mirror image makes the mean of x zero.
    y = y - weight @ y
    scale = np.sqrt(weight @ ((x**2 + y**2) / 2 + width**2))
    return Mixture(np.stack([x, y], axis=1) / scale, width / scale, weight)


def _mirrored(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Points of class 0 with the sign of x changed: from their half to the right one, or back."""
    unknown = np.setdiff1d(labels, [0, 1])
    if unknown.size:
        raise ValueError(f"label {unknown[0]}: the tree has the classes 0 and 1; name one of them")
    return points * np.stack([2 * labels - 1, np.ones_like(labels)], axis=1)


def _log_density(points: np.ndarray) -> np.ndarray:
    """Of class 1."""
    (x, y), widths, weights = _right_half().means.T, _right_half().widths, _right_half().weights
    log_peaks = np.log(weights / (2 * np.pi * widths**2))
    parts = []
    for rows in np.split(points, range(ROWS_AT_ONCE, len(points), ROWS_AT_ONCE)):
        squares = np.subtract.outer(rows[:, 0], x) ** 2 + np.subtract.outer(rows[:, 1], y) ** 2
        terms = log_peaks - squares / (2 * widths**2)
        most = terms.max(axis=1, keepdims=True)
        # Only a point that is not finite is invalid here; it gets NaN.
        with np.errstate(invalid="ignore"):
            parts.append(most[:, 0] + np.log(np.exp(terms - most).sum(axis=1)))
    return np.concatenate(parts)


def _draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, 2] and labels [n]."""
    means, widths, weights = _right_half()
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(weights), size=n, p=weights)
    points = means[chosen] + widths[chosen, None] * rng.standard_normal((n, 2))
    labels = np.arange(n, dtype=np.int32) % 2
    return _mirrored(points, labels), labels


@cache
def _typical_log_densities() -> np.ndarray:
    """Of many exact samples; the same for both classes, as they are mirror images."""
    return _log_density(_mirrored(*_draw(THRESHOLD_POINTS, _SEEDS["threshold"])))


@dataclass(frozen=True)
class Tree:
    """float32 'images' [1, 1, 2] with labels 0 (left half) and 1 (right half).

    Both coordinates have mean 0 and a standard deviation near 1 over the two classes.
    """

    split: str  # train (20000 points), held_out (10000)

    stored_shape = (1, 1, 2)
    stored_dtype = np.float32
    num_classes = 2

    def __post_init__(self):
        if self.split not in _SIZES:
            raise ValueError(f"split = {shown(self.split)}: must be one of {', '.join(_SIZES)}")

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        points, labels = self.sample(len(self), _SEEDS[self.split])
        return points.reshape(-1, *self.stored_shape).astype(self.stored_dtype), labels

    def __len__(self) -> int:
        return _SIZES[self.split]

    def held_out(self) -> Tree | None:
        return Tree("held_out") if self.split == "train" else None

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        points, labels = self._arrays
        return {"stored": points[indices], "label": labels[indices]}

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a frame that leaves some air around the tree."""
        (_, bottom), (right, top) = np.min(_right_half().means, 0), np.max(_right_half().means, 0)
        air = 0.06 * (top - bottom)
        return float(-right - air), float(right + air), float(bottom - air), float(top + air)

    def sample(
        self, n: int, seed: int
    ) -> tuple[Float64[np.ndarray, "n 2"], Int32[np.ndarray, "n"]]:
        """Exact draws of this density, the same for the same seed; the classes take turns."""
        return _draw(n, seed)

    def log_density(
        self, points: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, "n"]
    ) -> Float64[np.ndarray, "n"]:
        """Exact log p(point | class), natural logarithm; NaN where a point is not finite.

        Raises:
          ValueError: a label that is neither 0 nor 1.
        """
        return _log_density(_mirrored(points.astype(np.float64), labels))

    def threshold(self, quantile: float = 0.01) -> float:
        """The log density below which this share of a class's own mass lies, in either class."""
        return float(np.quantile(_typical_log_densities(), quantile))

    def is_outlier(
        self, points: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, "n"]
    ) -> Bool[np.ndarray, "n"]:
        """Returns whether the density of a point's class there is below its 1 % quantile."""
        # Negated, so that a point that is not finite is an outlier.
        return ~(self.log_density(points, labels) >= self.threshold())

    def outliers(self, points: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, "n"]) -> float:
        """The share of outliers: 0.01 for exact samples, up to chance."""
        return float(np.mean(self.is_outlier(points, labels)))
