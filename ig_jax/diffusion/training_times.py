"""Distributions of training times.

Each distribution is split into a standard draw and a deterministic map, so that a test or a replay
can hand in the draw. New one: a pair of functions and a row in `TIMES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ig_jax.diffusion.process import Path
from ig_jax.types import GroupTimes, Key, Times


class TimeDistribution(NamedTuple):
    """`draw(key, n)` gives standard draws [n]; `time(path, draw, mean, std)` times in [0, 1]."""

    draw: Callable[[Key, int], Times]
    time: Callable[[Path, GroupTimes, float, float], GroupTimes]


def _uniform(key: Key, n: int) -> Times:
    return jax.random.uniform(key, (n,), dtype=jnp.float32)


def _normal(key: Key, n: int) -> Times:
    return jax.random.normal(key, (n,), dtype=jnp.float32)


TIMES = {
    # t = u; has neither mean nor std
    "uniform": TimeDistribution(_uniform, lambda path, u, mean, std: u),
    # log(sigma/alpha) = mean + std z: linear path t = sigmoid(.), cosine path (2/pi) atan(exp(.))
    "lognormal": TimeDistribution(
        _normal, lambda path, z, mean, std: path.time_of_ratio(jnp.exp(mean + std * z))
    ),
    # logit(t) = mean + std z on every path (SD3, arXiv 2403.03206, section 3.1)
    "logit_normal": TimeDistribution(
        _normal, lambda path, z, mean, std: jax.nn.sigmoid(mean + std * z)
    ),
}
