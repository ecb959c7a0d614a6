"""Search spaces: points of a grid or random ones, with the config's own setting first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ig_jax.bounds import at_most
from ig_jax.errors import UserError, shown

METHODS = ("grid", "random")
MOST_POINTS = 10_000
_WHOLE = ("sampler.num_steps", "readout")  # fields that take whole numbers


@dataclass(frozen=True)
class Space:
    """Values to try: fields below `sample` such as 'ig.scale', each with the values it may take."""

    values: Mapping[str, tuple[float, ...]]
    # grid: every combination; random: uniform between smallest and largest value.
    method: str
    # Points of the random method; a grid ignores it.
    candidates: int = at_most(MOST_POINTS)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method = {shown(self.method)}: must be {' or '.join(METHODS)}")
        if self.method == "random" and self.candidates < 1:
            raise ValueError(f"candidates = {self.candidates}: must be at least 1")
        if not self.values:
            raise ValueError("values = {}: needs at least one field, such as ig.scale")
        for name, listed in self.values.items():
            if not listed or not all(map(math.isfinite, listed)):
                rule = "needs finite numbers, at least one"
                raise ValueError(f"values.{name} = {shown(listed)}: {rule}")
        points = math.prod(map(len, self.values.values()))
        if self.method == "grid" and points > MOST_POINTS:
            raise ValueError(
                f"values: make a grid of {points:,} points, must not make more than "
                f"{MOST_POINTS:,}; list fewer values"
            )


@dataclass(frozen=True)
class Candidate:
    """One setting of the searched fields, sorted by name; whole numbers are floats, too."""

    fields: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, values: Mapping[str, float | int]) -> Candidate:
        return cls(tuple(sorted((name, float(value)) for name, value in values.items())))

    @property
    def values(self) -> dict[str, float]:
        return dict(self.fields)

    def __str__(self) -> str:
        """'cfg.scale=1 ig.scale=1.5': the same on every run."""
        return " ".join(f"{name}={value:.10g}" for name, value in self.fields)


def _grid(space: Space) -> Iterator[dict[str, float]]:
    names = sorted(space.values)
    for point in itertools.product(*(space.values[name] for name in names)):
        yield dict(zip(names, point, strict=True))


def _random(space: Space, seed: int) -> Iterator[dict[str, float]]:
    """Endless. Four significant digits: what is shown is what ran."""
    rng = np.random.default_rng(seed)
    while True:
        point = {}
        for name in sorted(space.values):
            low, high = min(space.values[name]), max(space.values[name])
            drawn = float(f"{rng.uniform(low, high):.4g}")
            point[name] = min(max(drawn, low), high)
        yield point


def _settled(
    point: Mapping[str, float], own: Mapping[str, float | int], default: Mapping[str, float | int]
) -> Candidate | None:
    """The point with whole numbers, and with what has no effect as in `own`; None if impossible."""
    point = {name: float(round(v)) if name in _WHOLE else v for name, v in point.items()}
    full = {**default, **point}
    for guidance in ("ig", "cfg", "autoguidance"):
        low, high = f"{guidance}.low", f"{guidance}.high"
        if full.get(f"{guidance}.scale") == 1:  # off: its interval and readout do nothing
            idle = (low, high, "readout") if guidance == "ig" else (low, high)
            point |= {name: own[name] for name in idle if name in own}
        elif full.get(low, 0.0) > full.get(high, 1.0):
            return None
    return Candidate.of(point)


def candidates(space: Space, seed: int, default: Mapping[str, float | int]) -> list[Candidate]:
    """Lists the candidates, each once; number 0 is the config's own setting.

    Combinations with low > high are left out, and guidances that are off (scale 1) differ by
    their interval only in name. A random space may yield fewer points than asked for when hardly
    any are possible and new.

    Args:
      seed: of the random points.
      default: the config's own numbers below `sample`, also those that are not searched, so
        that an interval can be compared by both of its ends.

    Raises:
      UserError: a field is unknown, or nothing is left to compare with the config's own setting.
    """
    for name in space.values:
        if name not in default:
            raise UserError(f"search: sample.{name} is no number; known: {', '.join(default)}")
    own = {name: default[name] for name in space.values}
    points = (
        _grid(space)
        if space.method == "grid"
        else itertools.islice(_random(space, seed), 100 * space.candidates)
    )
    distinct = {Candidate.of(own): None}  # a dict keeps the order
    for point in points:
        if space.method == "random" and len(distinct) > space.candidates:
            break
        candidate = _settled(point, own, default)
        if candidate:
            distinct[candidate] = None
    if len(distinct) == 1:
        raise UserError(
            "the search space has no possible setting besides the config's own "
            f"({next(iter(distinct))}): list more values, with low <= high for each interval"
        )
    return list(distinct)
