"""Moving averages of the parameters, exponential ones and those by a power of time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ig_jax.optim import power_ema
from ig_jax.types import Params

Averages = Mapping[str, Params]  # `name` of an average -> averaged parameters, in no order
Which = Sequence[float | int | str]  # decays, and names of averages by a power of time
SIGMA_REL = "sigma_rel_"  # how those begin


def name(average: float | int | str) -> str:
    """Name of the average of a decay in a state and in a checkpoint; names stay as they are."""
    by_power = isinstance(average, str) and average.startswith(SIGMA_REL)
    return average if by_power else str(float(average))


def name_of_length(sigma_rel: float | int) -> str:
    """Name of a power-function average (`power_ema`): 'sigma_rel_0.05'."""
    return f"{SIGMA_REL}{sigma_rel:g}"


def length(name: str) -> float | None:
    """The sigma_rel of a name; None: it is no power-function average's, or none that can be had."""
    number = name.removeprefix(SIGMA_REL)
    if number == name:
        return None
    with suppress(ValueError):
        if power_ema.SHORTEST <= float(number) <= power_ema.LONGEST:
            return float(number)
    return None


def in_config(train: Mapping[str, Any]) -> list[str]:
    """Names of all averages of a run, the one that is sampled first, by its raw `train` section."""
    lengths = map(name_of_length, train.get("ema_sigma_rel", ()))
    return [*map(name, train["ema_decays"]), *lengths]


def first(averages: Averages, which: Which) -> Params:
    """The average that is sampled and evaluated: of the first decay.

    The config alone knows which is first: a compiled program hands a dict back in the order of its
    keys, and a checkpoint in an order of its own.

    Args:
      which: as configured, `train.ema_decays`.
    """
    return averages[name(which[0])]


def init(params: Params, which: Which) -> Averages:
    """Averages start as copies: a zero start would need a bias correction."""
    return {name(average): jax.tree.map(jnp.copy, params) for average in which}


def chosen(averages: Averages, which: Which) -> Averages:
    """These averages, where a run goes on with others than before.

    One that is new, of a decay, starts as a copy of that whose length, 1 / (1 - decay), is nearest
    its own by ratio.
    """
    decays = [other for other in averages if length(other) is None]

    def distance(other: str, decay: float) -> float:
        return abs(math.log((1 - float(other)) / (1 - decay)))

    def average(name: str) -> Params:
        if name in averages:
            return averages[name]
        nearest = min(decays, key=lambda other: distance(other, float(name)))
        return jax.tree.map(jnp.copy, averages[nearest])

    return {name(each): average(name(each)) for each in which}


def update(
    averages: Averages, params: Params, step: Array | int = 0, warmup_power: float = 0.0
) -> Averages:
    """e <- d e + (1 - d) p, for every leaf, fixed tables included (as the reference does).

    A power-function average has a d of its own in every step (`power_ema.share_of_new`).

    Parts of the network that `params` lacks stay as they are, to the bit.

    Args:
      step: updates done before this one.
      warmup_power: the d of a decay is at most 1 - (1 + step)^-power, so that an average forgets
        the initial weights; 0: d is the decay from the start. As `EMAModel` of Hugging Face's
        diffusers.
    """

    def moved(which: str, average: Params) -> Params:
        present = {name: average[name] for name in params}
        sigma_rel = length(which)
        if sigma_rel is not None:
            share = power_ema.share_of_new(sigma_rel, step)
            return jax.tree.map(lambda e, p: e + share * (p - e), present, params)
        decay = float(which)
        if warmup_power:
            decay = jnp.minimum(decay, 1 - (1.0 + step) ** -warmup_power)
        return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, present, params)

    return {which: {**average, **moved(which, average)} for which, average in averages.items()}


def share_of_initial(decay: float, steps: int, warmup_power: float = 0.0) -> float:
    """Weight of the initial parameters in an average after so many updates."""
    if warmup_power:
        return 0.0  # the first update leaves nothing of them
    return float(decay) ** steps
