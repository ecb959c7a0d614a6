"""Guidance as a velocity function: Internal Guidance on each branch, then classifier-free guidance.

  v_b  = v_readout,b + w (v_final,b - v_readout,b) for b in {cond, null}  (IG, arXiv 2512.24176)
  v    = v_null + s (v_cond - v_null)                                  (CFG, arXiv 2207.12598)

A scale of 1 is off for both. An interval is [low, high], inclusive on both ends, tested at the
first time of a sampling step; the published samplers do the same. Readouts come with every forward
pass, so IG costs no evaluation. CFG doubles the batch, so the steps outside its interval must not
run it: the grid is cut on the host, in float64, into stretches of equal flags, and each stretch
gets a velocity function that holds just what is on. Samplers see none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ig_jax.types import Field, Labels, Latents, NetFn, NetOutput, Params, Process, Scalar


@dataclass(frozen=True)
class Guidance:
    """One guidance: on for t in [low, high], off everywhere at scale 1."""

    scale: float
    low: float
    high: float

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"low = {self.low}, high = {self.high}: must satisfy 0 <= low <= high <= 1 "
                "(t = 0 is data, t = 1 is noise)"
            )

    def on(self, t: float) -> bool:
        return self.scale != 1.0 and self.low <= t <= self.high


class Stretch(NamedTuple):
    """Steps start..stop-1 of a grid, all with the same guidance."""

    start: int
    stop: int
    ig: bool
    cfg: bool


def stretches(grid: np.ndarray, ig: Guidance, cfg: Guidance) -> list[Stretch]:
    """Cuts the steps of a float64 time grid [steps + 1] where a guidance switches on or off."""
    flags = [(ig.on(t), cfg.on(t)) for t in grid[:-1].tolist()]
    cut, start = [], 0
    for (ig_on, cfg_on), run in groupby(flags):
        stop = start + len(list(run))
        cut.append(Stretch(start, stop, ig_on, cfg_on))
        start = stop
    return cut


def evaluations(cut: Sequence[Stretch], calls_per_step: int) -> int:
    """Network evaluations of one sample, counting a conditional and a null pass as two.

    The last step of every sampler evaluates once.
    """
    passes = [2 if s.cfg else 1 for s in cut for _ in range(s.start, s.stop)]
    return sum(passes[:-1]) * calls_per_step + passes[-1]


def internal(out: NetOutput, readout: int, scale: float) -> Latents:
    """v_readout + scale (v_final - v_readout)."""
    early = out.heads[readout]
    return early + scale * (out.pred - early)


def field(
    net: NetFn,
    params: Params,
    y: Labels,
    *,
    process: Process,
    null_class: int,
    readout: int | None,
    ig_scale: float | None,
    cfg_scale: float | None,
) -> Field:
    """The guided velocity of a network, and the score that belongs to it.

    Args:
      net, params: the network.
      y: labels [b].
      process: turns predictions into velocities.
      null_class: the label that stands for no class.
      readout: depth of the early head that IG extrapolates from; None where there is none.
      ig_scale, cfg_scale: None leaves that guidance, and its cost, out.
    """

    def predict(x: Latents, t: Scalar, y: Labels) -> Latents:
        times = jnp.full(x.shape[:1], t, dtype=jnp.float32)
        out = net(params, x, process.condition_time(times), y)
        pred = out.pred if ig_scale is None else internal(out, readout, ig_scale)
        return process.velocity(pred, x, times)

    def with_cfg(x: Latents, t: Scalar) -> Latents:
        both = jnp.concatenate([y, jnp.full_like(y, null_class)])
        cond, null = jnp.split(predict(jnp.concatenate([x, x]), t, both), 2)
        return null + cfg_scale * (cond - null)

    velocity = with_cfg if cfg_scale is not None else lambda x, t: predict(x, t, y)
    return Field(velocity, process.score)


def fields(
    cut: Sequence[Stretch],
    net: NetFn,
    params: Params,
    y: Labels,
    *,
    process: Process,
    null_class: int,
    readout: int | None,
    ig: Guidance,
    cfg: Guidance,
) -> list[tuple[Field, int, int]]:
    """(field, start, stop) for every stretch: what `samplers.base.integrate` takes."""
    return [
        (
            field(
                net,
                params,
                y,
                process=process,
                null_class=null_class,
                readout=readout,
                ig_scale=ig.scale if s.ig else None,
                cfg_scale=cfg.scale if s.cfg else None,
            ),
            s.start,
            s.stop,
        )
        for s in cut
    ]
