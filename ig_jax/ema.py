"""Exponential moving averages of the parameters, one or several lengths at once."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ig_jax.types import Params

Averages = Mapping[str, Params]  # decay as written in the config -> averaged parameters


def init(params: Params, decays: tuple[float, ...]) -> Averages:
    """Averages start as copies: a zero start would need a bias correction."""
    return {str(decay): jax.tree.map(jnp.copy, params) for decay in decays}


def update(averages: Averages, params: Params) -> Averages:
    """e <- d e + (1 - d) p, for every leaf, fixed tables included (as the reference does)."""
    return {
        decay: jax.tree.map(lambda e, p, d=float(decay): d * e + (1 - d) * p, average, params)
        for decay, average in averages.items()
    }
