"""Exponential moving averages of the parameters, one or several lengths at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

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


def update(averages: Averages, params: Params) -> Averages:
    """e <- d e + (1 - d) p, for every leaf, fixed tables included (as the reference does).

    Parts of the network that `params` lacks stay as they are, to the bit.
    """

    def moved(decay: float, average: Params) -> Params:
        present = {name: average[name] for name in params}
        return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, present, params)

    return {d: {**average, **moved(float(d), average)} for d, average in averages.items()}
