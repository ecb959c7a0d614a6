"""Exponential moving averages of the parameters, one or several lengths at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ig_jax.types import Params

Averages = Mapping[str, Params]  # `name` of a decay -> averaged parameters, in no order
Decays = Sequence[float | int]  # as written in the config


def name(decay: float | int) -> str:
    """Name of the average of this decay in a state and in a checkpoint."""
    return str(float(decay))


def first(averages: Averages, decays: Decays) -> Params:
    """The average that is sampled and evaluated: of the first decay.

    The config alone knows which is first: a compiled program hands a dict back in the order of its
    keys, and a checkpoint in an order of its own.

    Args:
      decays: as configured, `train.ema_decays`.
    """
    return averages[name(decays[0])]


def init(params: Params, decays: Decays) -> Averages:
    """Averages start as copies: a zero start would need a bias correction."""
    return {name(decay): jax.tree.map(jnp.copy, params) for decay in decays}


def of_decays(averages: Averages, decays: Decays) -> Averages:
    """The averages of these decays, where a run goes on with others than before.

    One that is new starts as a copy of that whose length, 1 / (1 - decay), is nearest its own by
    ratio.
    """

    def distance(other: str, decay: float | int) -> float:
        return abs(math.log((1 - float(other)) / (1 - decay)))

    def average(decay: float | int) -> Params:
        if name(decay) in averages:
            return averages[name(decay)]
        nearest = min(averages, key=lambda other: distance(other, decay))
        return jax.tree.map(jnp.copy, averages[nearest])

    return {name(decay): average(decay) for decay in decays}


def update(
    averages: Averages, params: Params, step: Array | int = 0, warmup_power: float = 0.0
) -> Averages:
    """e <- d e + (1 - d) p, for every leaf, fixed tables included (as the reference does).

    Parts of the network that `params` lacks stay as they are, to the bit.

    Args:
      step: updates done before this one.
      warmup_power: d is at most 1 - (1 + step)^-power, so that an average forgets the initial
        weights; 0: d is the decay from the start. As `EMAModel` of Hugging Face's diffusers.
    """

    def moved(decay: float, average: Params) -> Params:
        if warmup_power:
            decay = jnp.minimum(decay, 1 - (1.0 + step) ** -warmup_power)
        present = {name: average[name] for name in params}
        return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, present, params)

    return {d: {**average, **moved(float(d), average)} for d, average in averages.items()}


def share_of_initial(decay: float, steps: int, warmup_power: float = 0.0) -> float:
    """Weight of the initial parameters in an average after so many updates."""
    if warmup_power:
        return 0.0  # the first update leaves nothing of them
    return float(decay) ** steps
