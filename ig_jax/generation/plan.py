"""Sampling plans: time grid and guidance segments, which select a compiled program."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ig_jax import guidance
from ig_jax.guidance import AT_EVERY_EVALUATION, Guidances, NullClass, Segment
from ig_jax.samplers.base import Sampler
from ig_jax.types import Process


class Plan(NamedTuple):
    """Key of the compiled program that samples; the scales of guidance are not in it."""

    sampler: Sampler
    grid: tuple[float, ...]  # times, from noise to data
    segments: tuple[Segment, ...]
    channels: tuple[tuple[str, int], ...]  # kind of guidance -> its channels
    readout: int | None  # depth that Internal Guidance extrapolates from; None where that is off
    null: NullClass = AT_EVERY_EVALUATION  # of CFG


def plan(
    process: Process,
    sampler: Sampler,
    guidances: Guidances,
    time_shift: float = 1.0,
    readout: int | None = None,
    null: NullClass = AT_EVERY_EVALUATION,
) -> Plan:
    """Cuts the times that `sampler` visits where a guidance switches on or off.

    Args:
      process: gives the interval of times.
      sampler: gives the grid.
      guidances: kind -> settings.
      time_shift: see `shift_times`.
      readout: depth that Internal Guidance extrapolates from; None where the network has none.
      null: how CFG asks for the null class.
    """
    low, high = process.interval(sampling=True)
    channels = tuple((kind, g.channels) for kind, g in guidances.items())
    if sampler.adaptive:
        grid, segments = guidance.adaptive_segments(high, low, guidances)
    else:
        grid = sampler.grid()
        if sampler.process is None:
            grid = low + (high - low) * shift_times(grid, time_shift)
        segments = guidance.segments(grid, guidances, at_end=sampler.guided_at_end)
    on = frozenset().union(*(s.on | s.on_at_end for s in segments))
    null = null if "cfg" in on else AT_EVERY_EVALUATION
    used = readout if "ig" in on else None
    return Plan(sampler, tuple(grid.tolist()), segments, channels, used, null)


def shift_times(grid: np.ndarray, shift: float) -> np.ndarray:
    """t -> s t / (1 + (s - 1) t): above 1, more of the steps at high noise; 1 changes nothing.

    As in SD3 (arXiv 2403.03206, section 5.3.2). LightningDiT's `timestep_shift` counts time from
    noise to data: its 0.3 is 1 / 0.3 here.
    """
    # Written so that 1 stays exactly 1, which is inside an interval that ends there.
    return grid / (grid + (1 - grid) / shift)
