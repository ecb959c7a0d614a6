"""Guidance as a velocity function. Every kind extrapolates from a worse velocity to a better one:

  v <- v_worse + w (v - v_worse)

  kind            v_worse                              where                 evaluations
  ig              the readout of the same pass         each branch, first    none
  cfg             the null class of the same network   then                  doubles the batch
  autoguidance    another network, same labels         last                  one of that network

The null class may be asked more cheaply than at every evaluation of the network (`NullClass`).

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

from ig_jax.bounds import unset
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


@dataclass(frozen=True)
class NullClass:
    """How CFG asks the network for its prediction without a class."""

    # 1: at every evaluation. k: at the first evaluation of every k-th step; the difference between
    # class and null class found there guides all evaluations until the next.
    every_steps: int = 1
    # Depth of the readout that predicts it, without IG and the blocks behind it; None: the final
    # output.
    readout: int | None = unset(0, None)

    def __post_init__(self):
        if self.every_steps < 1:
            raise ValueError(
                f"every_steps = {self.every_steps}: must be at least 1 (at every evaluation)"
            )

    def __str__(self) -> str:
        """'every 2 steps, by readout 8'."""
        often = f"every {self.every_steps} steps" if self.every_steps > 1 else "at every evaluation"
        return often + (f", by readout {self.readout}" if self.readout else "")

    def check(self, adaptive: bool) -> None:
        """Raises ValueError where a sampler that is `adaptive` has no steps to count."""
        if adaptive and self.every_steps > 1:
            raise ValueError(
                f"null_class.every_steps = {self.every_steps}: this sampler chooses its own steps; "
                "set it to 1, or use a sampler with a fixed grid, such as heun"
            )

    def asked_at(self, step: int | Array) -> bool | Array:
        """Whether a step asks, counted from the one in which CFG came on."""
        return step % self.every_steps == 0


AT_EVERY_EVALUATION = NullClass()

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
    """Passes of one sample."""

    network: int  # whole ones; conditional and null are two
    other: int  # of the network that autoguidance extrapolates from
    to_readout: int = 0  # through the first blocks alone, for the null class


def evaluations(
    cut: Sequence[Segment],
    calls: Sequence[int],
    null: NullClass = AT_EVERY_EVALUATION,
    kind: str | None = None,
) -> Evaluations:
    """Counts passes, given the evaluations of the field in every step [steps].

    With `kind`, only those in which that guidance is on.
    """
    total = Evaluations(0, 0)
    for s in cut:
        for i in range(s.start, s.stop):
            left = calls[i] if null.every_steps == 1 else int(null.asked_at(i - s.start))
            for on in (s.on, *[s.on_at_end] * (calls[i] - 1)):
                asked = "cfg" in on and left > 0
                left -= asked
                if kind is None or kind in on:
                    whole = asked and null.readout is None
                    passes = (1 + whole, "autoguidance" in on, asked and not whole)
                    total = Evaluations(*map(sum, zip(total, passes, strict=True)))
    return total


def extrapolate(worse: Latents, v: Latents, scale: Scalar | float, channels: int = 0) -> Latents:
    """worse + scale (v - worse) on the first `channels` channels (0: on all); v on the rest."""
    guided = worse + scale * (v - worse)
    return guided if not channels else jnp.where(jnp.arange(v.shape[-1]) < channels, guided, v)


def _for_rows(x: Latents, t: Scalar) -> Times:
    """One time for every row of x."""
    return jnp.full(x.shape[:1], t, dtype=jnp.float32)


@dataclass(frozen=True)
class GuideModel:
    """The network that autoguidance extrapolates from, and what its predictions mean."""

    net: NetFn
    process: Process
    params: Params


class _Difference:
    """What CFG found in the step before, while one step is traced.

    Its evaluations follow each other in one program: none is inside a loop of its own.
    """

    def __init__(self, value: Latents, asked: Array):
        self.value = value  # class minus null class, as converted for the sampler
        self._asked = asked  # whether this step asks
        self._found = False  # whether its first evaluation with CFG is behind

    def next(
        self, ask: Callable[[], tuple[Latents, Latents, Any]], only_class: Callable[[], tuple]
    ) -> tuple[Latents, Latents, Any]:
        """(for the class, for the null class, rest) of an evaluation: what `ask` says of both, or
        what `only_class` says of one (prediction, rest), and the difference."""

        def anew() -> tuple[Latents, Latents, Any]:
            found, null, rest = ask()
            return found, (found - null).astype(self.value.dtype), rest

        def again() -> tuple[Latents, Latents, Any]:
            found, rest = only_class()
            return found, self.value, rest

        first, self._found = not self._found, True
        found, self.value, rest = jax.lax.cond(self._asked, anew, again) if first else again()
        return found, found - self.value, rest


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
      null: how the null class is asked.
      difference: of CFG in the step that this is for; None: every evaluation finds its own.
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
    null: NullClass = AT_EVERY_EVALUATION
    difference: _Difference | None = None

    def _extrapolate(self, kind: str, worse: Latents, v: Latents) -> Latents:
        return extrapolate(worse, v, self.scales[kind], self.channels.get(kind, 0))

    def _branch(
        self, convert: Conversion, on: Active, x: Latents, t: Scalar, y: Labels
    ) -> tuple[Latents, Latents | None]:
        times = _for_rows(x, t)
        at = (x, self.process.condition_time(times), y)
        out = self.net(self.params, *at, **self._groups(len(x) // len(self.y)))
        pred = out.pred
        if "ig" in on:
            pred = self._extrapolate("ig", out.heads[self.readout], pred)
        return convert(self.process)(pred, x, times), out.variance

    def _groups(self, branches: int) -> dict[str, TokenGroups]:
        """The argument of the network, for a batch of so many branches."""
        if self.groups is None:
            return {}
        return {"groups": jax.tree.map(lambda ids: jnp.tile(ids, (branches, 1)), self.groups)}

    def _both(
        self, convert: Conversion, on: Active, x: Latents, t: Scalar
    ) -> tuple[Latents, Latents, Latents | None]:
        """For the class, for the null class; the variance as the labels alone have it."""
        null = jnp.full_like(self.y, self.null_class)
        if self.null.readout is None:
            y = jnp.concatenate([self.y, null])
            both, variance = self._branch(convert, on, jnp.concatenate([x, x]), t, y)
            return *jnp.split(both, 2), None if variance is None else variance[: len(x)]
        times = _for_rows(x, t)
        at = (x, self.process.condition_time(times), null)
        early = self.net.early(self.params, *at, self.null.readout, **self._groups(1))
        found, variance = self._branch(convert, on, x, t, self.y)
        return found, convert(self.process)(early, x, times), variance

    def _of_guide(self, convert: Conversion, x: Latents, t: Scalar) -> Latents:
        guide = self.guide
        times = _for_rows(x, t)
        out = guide.net(guide.params, x, guide.process.condition_time(times), self.y)
        return convert(guide.process)(out.pred, x, times)

    def _guided(
        self, convert: Conversion, on: Active, x: Latents, t: Scalar
    ) -> tuple[Latents, Latents | None]:
        """Guided predictions after `convert`; the variance as the labels alone have it."""
        one = partial(self._branch, convert, on, x, t, self.y)
        if "cfg" in on:
            both = partial(self._both, convert, on, x, t)
            kept = self.difference
            found, null, variance = both() if kept is None else kept.next(both, one)
            found = self._extrapolate("cfg", null, found)
        else:
            found, variance = one()
        if "autoguidance" in on:
            worse = self._of_guide(convert, x, t)
            found = self._extrapolate("autoguidance", worse, found)
        return found, variance

    def velocity(self, on: Active, x: Latents, t: Scalar) -> Latents:
        """dx/dt [b, h, w, c] at (x, t) with the kinds `on`."""
        return self._guided(TO_VELOCITY, on, x, t)[0]

    def field(self, on: Active, on_at_end: Active, start: int = 0) -> Field:
        """All that a sampler sees while these kinds are on, from step `start` of the grid."""
        kept = self.difference
        keeps = kept is None and self.null.every_steps > 1 and "cfg" in on | on_at_end

        def at_end(x: Latents, t: Scalar) -> Latents:
            return self.velocity(on_at_end, x, t)

        def of_step(i: Array, left: Latents) -> Field:
            here = self
            if keeps:
                asked = self.null.asked_at(i - start)
                here = replace(here, difference=_Difference(left, asked))
            if self.groups_of_step:
                here = replace(here, groups=self.groups_of_step(i), groups_of_step=None)
            return here.field(on, on_at_end)

        return Field(
            velocity=partial(self.velocity, on),
            score=self.process.score,
            velocity_at_end=None if on == on_at_end else at_end,
            noise_and_variance=partial(self._guided, TO_NOISE, on),
            coefficients=self.process.coefficients,
            time_of_ratio=self.process.time_of_ratio,
            of_step=of_step if keeps or self.groups_of_step else None,
            left=None if kept is None else lambda: kept.value,
        )

    def fields(self, cut: Sequence[Segment]) -> list[tuple[Field, int, int]]:
        """(field, start, stop) for every segment: what `samplers.base.sample` takes."""
        return [(self.field(s.on, s.on_at_end, s.start), s.start, s.stop) for s in cut]
