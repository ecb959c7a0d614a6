"""Guidances at random, and samplers on a grid of their own."""

import numpy as np

from ig_jax.guidance import KINDS, Guidance
from ig_jax.samplers import SAMPLERS

OFF = Guidance(scale=1.0, low=0.0, high=1.0)
# Samplers of any process on a grid of their own; the others choose their steps, or take DDPM's.
FIXED = {n: s for n, s in SAMPLERS.items() if not s.adaptive and s.process is None}


def random_guidances(rng: np.random.Generator, grid: np.ndarray) -> dict[str, Guidance]:
    """All kinds with random intervals, about one in three of them off."""
    given = {}
    for kind in KINDS:
        # Half of the ends lie on the grid, where a comparison in the wrong precision would show.
        ends = np.where(rng.random(2) < 0.5, rng.random(2), rng.choice(grid, 2))
        given[kind] = Guidance(float(rng.choice([1.0, 1.4, 3.0])), *sorted(ends.tolist()))
    return given


def random_case(seed: int):
    """A sampler of a random length and random guidances."""
    rng = np.random.default_rng(seed)
    sampler = list(FIXED.values())[seed % len(FIXED)](int(rng.integers(2, 12)))
    return sampler, random_guidances(rng, sampler.grid())
