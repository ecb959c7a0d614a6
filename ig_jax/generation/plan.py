"""Sampling plans: time grid and guidance segments, which select a compiled program."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ig_jax import guidance
from ig_jax.config.run_config import Config
from ig_jax.guidance import Guidances, Segment
from ig_jax.samplers.base import Sampler


class Plan(NamedTuple):
    """What decides which program draws samples; the scales of guidance do not."""

    sampler: Sampler
    grid: tuple[float, ...]  # times, from noise to data
    cut: tuple[Segment, ...]
    channels: tuple[tuple[str, int], ...]  # kind of guidance -> its channels


def plan(config: Config, sampler: Sampler, guidances: Guidances) -> Plan:
    """The times that `sampler` visits under `config`, and what guides it when."""
    low, high = config.process.interval(sampling=True)
    channels = tuple((kind, g.channels) for kind, g in guidances.items())
    if sampler.adaptive:
        grid, cut = guidance.adaptive_segments(high, low, guidances)
    else:
        grid = low + (high - low) * shift_times(sampler.grid(), config.sample.time_shift)
        cut = guidance.segments(grid, guidances, at_end=sampler.guided_at_end)
    return Plan(sampler, tuple(grid.tolist()), cut, channels)


def shift_times(grid: np.ndarray, shift: float) -> np.ndarray:
    """t -> s t / (1 + (s - 1) t): above 1, more of the steps at high noise; 1 changes nothing.

    As in SD3 (arXiv 2403.03206, section 5.3.2). LightningDiT's `timestep_shift` counts time from
    noise to data: its 0.3 is 1 / 0.3 here.
    """
    # Written so that 1 stays exactly 1, which is inside an interval that ends there.
    return grid / (grid + (1 - grid) / shift)
