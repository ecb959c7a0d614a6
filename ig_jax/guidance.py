"""Guidance as a velocity function. Every kind extrapolates from a worse velocity to a better one:

  v <- v_worse + w (v - v_worse)

  kind            v_worse                              where                 evaluations
  ig              the readout of the same pass         each branch, first    none
  cfg             the null class of the same network   then                  doubles the batch
  autoguidance    another network, same labels         last                  one of that network

Sources: Internal Guidance arXiv 2512.24176, CFG arXiv 2207.12598, autoguidance arXiv 2406.02507.
IG first, on the conditional and on the null branch, is what the published code does. Autoguidance
comes last and once: the worse network is asked for the labels, unguided.

A scale of 1 is off. An interval is [low, high], inclusive on both ends, tested at the first time of
a sampling step; the published samplers do the same. A time within `EDGE` of an end is at it: the
time 3/10 of a grid and the 0.3 of a config are not the same number in binary. CFG doubles the
batch, so the steps outside its interval must not run it: the grid is cut on the host, in float64,
into segments of equal kinds, and each segment gets a velocity function that holds just what is on.
Scales are left out of the cut, so that one compiled program serves all of them. Samplers see none
of this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ig_jax.types import (
    Field,
    Labels,
    Latents,
    NetFn,
    Params,
    Process,
    Scalar,
    Times,
    TokenGroups,
)

KINDS = ("ig", "cfg", "autoguidance")
EDGE = 1e-9  # far above the rounding of a grid in float64, far below any step


@dataclass(frozen=True)
class Guidance:
    """One guidance: on for t in [low, high], off everywhere at scale 1."""

    scale: float
    low: float
    high: float
    # Only the first so many channels are guided; 0 is all of them.
    channels: int = 0

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"low = {self.low}, high = {self.high}: must satisfy 0 <= low <= high <= 1 "
                "(t = 0 is data, t = 1 is noise)"
            )
        if self.channels < 0:
            raise ValueError(f"channels = {self.channels}: must not be negative (0 is all)")

    def on(self, t: float) -> bool:
        return self.scale != 1.0 and self.low - EDGE <= t <= self.high + EDGE


# Process -> the method that converts (prediction, x, times). Guidance commutes with it.
Conversion = Callable[[Process], Callable[[Latents, Latents, Times], Latents]]
TO_VELOCITY: Conversion = attrgetter("velocity")
TO_NOISE: Conversion = attrgetter("noise")

Guidances = Mapping[str, Guidance]  # kind -> settings
Active = frozenset[str]  # kinds that are on


def only(guidances: Guidances, kinds: Collection[str]) -> Guidances:
    """The same guidances with all but `kinds` turned off."""
    return {k: g if k in kinds else replace(g, scale=1.0) for k, g in guidances.items()}


class Segment(NamedTuple):
    """Steps start..stop-1 of a grid, all with the same guidance."""

    start: int
    stop: int
    on: Active
    # At the later time of each step; differs only for samplers that ask for it.
    on_at_end: Active


def active_kinds(guidances: Guidances, t: float) -> Active:
    return frozenset(kind for kind, g in guidances.items() if g.on(t))


def segments(
    grid: np.ndarray, guidances: Guidances, *, at_end: bool = False
) -> tuple[Segment, ...]:
    """Cuts the steps of a float64 time grid [steps + 1] where a guidance switches on or off.

    Args:
      at_end: whether the sampler also asks for the guidance at the end of a step.
    """
    at = [active_kinds(guidances, t) for t in grid.tolist()]
    flags = list(zip(at[:-1], at[1:] if at_end else at[:-1], strict=True))
    cut, start = [], 0
    for (on, on_at_end), run in groupby(flags):
        stop = start + len(list(run))
        cut.append(Segment(start, stop, on, on_at_end))
        start = stop
    return tuple(cut)


def adaptive_segments(first: float, last: float, guidances: Guidances) -> tuple[np.ndarray, tuple]:
    """For a sampler that chooses its own steps: (grid, segments) cut at the intervals' ends.

    Guidance is then constant in time on each piece, so that no step of an adaptive solver meets a
    jump, and one step of this grid is one piece. Times nearer than 2 `EDGE` are one, so that the
    middle of a piece is at neither of its ends.
    """
    ends = {t for g in guidances.values() if g.scale != 1.0 for t in (g.low, g.high)}
    times = [first]
    for t in sorted(ends, reverse=True):
        if last + 2 * EDGE < t < times[-1] - 2 * EDGE:
            times.append(t)
    grid = np.array([*times, last])
    middles = ((grid[:-1] + grid[1:]) / 2).tolist()
    on = [active_kinds(guidances, t) for t in middles]
    return grid, tuple(Segment(i, i + 1, kinds, kinds) for i, kinds in enumerate(on))


class Evaluations(NamedTuple):
    """Passes of one sample: of the network (conditional and null are two), of the worse one."""

    network: int
    other: int


def evaluations(
    cut: Sequence[Segment], calls: Sequence[int], kind: str | None = None
) -> Evaluations:
    """Counts passes, given the evaluations of the field in every step [steps].

    With `kind`, only those in which that guidance is on.
    """

    def passes(on: Active, count: int) -> Evaluations:
        if kind is not None and kind not in on:
            return Evaluations(0, 0)
        return Evaluations(count * (2 if "cfg" in on else 1), count * ("autoguidance" in on))

    each = [
        passes(on, n)
        for s in cut
        for i in range(s.start, s.stop)
        for on, n in ((s.on, 1), (s.on_at_end, calls[i] - 1))
    ]
    return Evaluations(*map(sum, zip(*each, strict=True)))


def extrapolate(worse: Latents, v: Latents, scale: Scalar | float, channels: int = 0) -> Latents:
    """worse + scale (v - worse) on the first `channels` channels (0: on all); v on the rest."""
    guided = worse + scale * (v - worse)
    return guided if not channels else jnp.where(jnp.arange(v.shape[-1]) < channels, guided, v)


@dataclass(frozen=True)
class GuideModel:
    """The network that autoguidance extrapolates from, and what its predictions mean."""

    net: NetFn
    process: Process
    params: Params


@dataclass(frozen=True)
class Guided:
    """A network with everything that guidance needs around it.

    Args:
      net, params, process: the network, and what its predictions mean.
      y: labels [b].
      null_class: the label that stands for no class.
      scales: kind -> scale, a number or a traced scalar, for every kind that may be on.
      channels: kind -> how many of the first channels are guided; 0, or no entry, is all.
      readout: depth of the early head that IG extrapolates from; None where there is none.
      guide: the network that autoguidance extrapolates from; None where there is none.
      groups: of each sample's tokens, in both of its branches; the guide has none. None: all tokens
        see each other.
      groups_of_step: step -> `groups`, where they change from step to step.
    """

    net: NetFn
    params: Params
    process: Process
    y: Labels
    null_class: int
    scales: Mapping[str, Scalar | float]
    channels: Mapping[str, int]
    readout: int | None = None
    guide: GuideModel | None = None
    groups: TokenGroups | None = None
    groups_of_step: Callable[[Array], TokenGroups] | None = None

    def _extrapolate(self, kind: str, worse: Latents, v: Latents) -> Latents:
        return extrapolate(worse, v, self.scales[kind], self.channels.get(kind, 0))

    def _branch(
        self, convert: Conversion, on: Active, x: Latents, t: Scalar, y: Labels
    ) -> tuple[Latents, Latents | None]:
        times = jnp.full(x.shape[:1], t, dtype=jnp.float32)
        asked = {}
        if self.groups is not None:
            branches = len(x) // len(self.y)
            asked["groups"] = jax.tree.map(lambda ids: jnp.tile(ids, (branches, 1)), self.groups)
        out = self.net(self.params, x, self.process.condition_time(times), y, **asked)
        pred = out.pred
        if "ig" in on:
            pred = self._extrapolate("ig", out.heads[self.readout], pred)
        return convert(self.process)(pred, x, times), out.variance

    def _of_guide(self, convert: Conversion, x: Latents, t: Scalar) -> Latents:
        guide = self.guide
        times = jnp.full(x.shape[:1], t, dtype=jnp.float32)
        out = guide.net(guide.params, x, guide.process.condition_time(times), self.y)
        return convert(guide.process)(out.pred, x, times)

    def _guided(
        self, convert: Conversion, on: Active, x: Latents, t: Scalar
    ) -> tuple[Latents, Latents | None]:
        """Guided predictions after `convert`; the variance as the labels alone have it."""
        if "cfg" in on:
            y = jnp.concatenate([self.y, jnp.full_like(self.y, self.null_class)])
            both, variance = self._branch(convert, on, jnp.concatenate([x, x]), t, y)
            cond, null = jnp.split(both, 2)
            found = self._extrapolate("cfg", null, cond)
            variance = None if variance is None else variance[: len(x)]
        else:
            found, variance = self._branch(convert, on, x, t, self.y)
        if "autoguidance" in on:
            worse = self._of_guide(convert, x, t)
            found = self._extrapolate("autoguidance", worse, found)
        return found, variance

    def velocity(self, on: Active, x: Latents, t: Scalar) -> Latents:
        """dx/dt [b, h, w, c] at (x, t) with the kinds `on`."""
        return self._guided(TO_VELOCITY, on, x, t)[0]

    def field(self, on: Active, on_at_end: Active) -> Field:
        """All that a sampler sees while these kinds are on."""

        def at_end(x: Latents, t: Scalar) -> Latents:
            return self.velocity(on_at_end, x, t)

        def of_step(i: Array) -> Field:
            here = replace(self, groups=self.groups_of_step(i), groups_of_step=None)
            return here.field(on, on_at_end)

        return Field(
            velocity=partial(self.velocity, on),
            score=self.process.score,
            velocity_at_end=None if on == on_at_end else at_end,
            noise_and_variance=partial(self._guided, TO_NOISE, on),
            coefficients=self.process.coefficients,
            time_of_ratio=self.process.time_of_ratio,
            of_step=None if self.groups_of_step is None else of_step,
        )

    def fields(self, cut: Sequence[Segment]) -> list[tuple[Field, int, int]]:
        """(field, start, stop) for every segment: what `samplers.base.sample` takes."""
        return [(self.field(s.on, s.on_at_end), s.start, s.stop) for s in cut]
