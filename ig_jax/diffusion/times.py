"""How training times are drawn.

Each distribution is split into a standard draw and a deterministic map, so that a test or a replay
can hand in the draw. New one: a pair of functions and a row in `TIMES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ig_jax.diffusion.process import Path
from ig_jax.types import Key, Times


class TimeDistribution(NamedTuple):
    """`draw(key, n)` gives standard draws [n], `time(path, draw)` the times in [0, 1]."""

    draw: Callable[[Key, int], Times]
    time: Callable[[Path, Times], Times]


def _uniform(key: Key, n: int) -> Times:
    return jax.random.uniform(key, (n,), dtype=jnp.float32)


def _normal(key: Key, n: int) -> Times:
    return jax.random.normal(key, (n,), dtype=jnp.float32)


TIMES = {
    # t = u
    "uniform": TimeDistribution(_uniform, lambda path, u: u),
    # sigma/alpha = exp(z): linear path t = sigmoid(z), cosine path t = (2/pi) atan(exp(z))
    "lognormal": TimeDistribution(_normal, lambda path, z: path.time_of_ratio(jnp.exp(z))),
}
