"""Settings of one call, checked, with those of the run where a call gives none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ig_jax.config.schema import Sample
from ig_jax.errors import UserError, shown
from ig_jax.generation.batches import labels_of
from ig_jax.guidance import Guidances
from ig_jax.samplers import SAMPLERS
from ig_jax.samplers.base import Sampler

# A scale (1 is off), or (scale, low, high) with the interval of times in which it holds.
GuidanceRequest = float | tuple[float, float, float] | None


def labels(
    sampling: Sample,
    num_classes: int,
    requested: Sequence[int] | np.ndarray | None,
    num: int | None,
    seed: int,
) -> np.ndarray:
    """Labels int32 [n]: the requested ones, or `num` by the rule of `sampling.labels`.

    Raises:
      UserError: they are no list of classes, or not `num`.
    """
    if requested is None:
        count = sampling.batch_size if num is None else num
        if count < 1:
            raise UserError(f"num = {num}: must be at least 1")
        return labels_of(sampling, num_classes, seed, np.arange(count))
    y = np.atleast_1d(np.asarray(requested))
    if y.ndim != 1 or not len(y) or not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"labels = {shown(requested)}: must be a list of class numbers")
    if y.min() < 0 or y.max() > num_classes:
        raise UserError(
            f"labels = {shown(requested)}: must lie in 0..{num_classes - 1}, or be "
            f"{num_classes} for the null class"
        )
    if num not in (None, len(y)):
        raise UserError(f"num = {num}: leave it out, {len(y)} labels are given")
    return y.astype(np.int32)


def guidances(
    sampling: Sample, requested: Mapping[str, GuidanceRequest], *, guided: bool
) -> Guidances:
    """Kind -> settings.

    Args:
      sampling: the run's settings.
      requested: kind -> what the call gives; a scale alone keeps the run's interval.
      guided: whether the call names the network that autoguidance extrapolates from; without one
        the run's own autoguidance is off, as its network is not loaded.

    Raises:
      UserError: an interval is none; autoguidance is asked for without a network.
    """
    settings = dict(sampling.guidances)
    if not guided:
        settings["autoguidance"] = replace(settings["autoguidance"], scale=1.0)
    for kind, value in requested.items():
        if value is None:
            continue
        scale, *ends = value if isinstance(value, tuple) else (value,)
        interval = dict(zip(("low", "high"), map(float, ends), strict=True)) if ends else {}
        try:
            settings[kind] = replace(settings[kind], scale=float(scale), **interval)
        except ValueError as error:
            raise UserError(f"{kind}: {error}") from error
    if settings["autoguidance"].scale != 1 and not guided:
        raise UserError(
            f"autoguidance = {settings['autoguidance'].scale:g}: name the network to extrapolate "
            "from, guide=ig_jax.load(...)"
        )
    return settings


def require_readout(readouts: tuple[int, ...], requested: int | None) -> None:
    """Raises UserError where a network with these readouts has not the requested one."""
    if requested is not None and requested not in readouts:
        has = f"be one of {', '.join(map(str, readouts))}" if readouts else "be left out"
        raise UserError(f"readout = {shown(requested)}: must {has}, by this network's readouts")


def sampler(sampling: Sample, requested: str | Sampler | None, steps: int | None) -> Sampler:
    """The sampler: by name, as it is requested, or the run's own; with another number of steps.

    Raises:
      UserError: the name is unknown, or the number of steps is.
    """
    own = sampling.sampler
    if isinstance(requested, str) and requested not in SAMPLERS:
        raise UserError(f"sampler = {requested!r}: is unknown; known: {', '.join(SAMPLERS)}")
    try:
        if isinstance(requested, str):
            return SAMPLERS[requested](own.num_steps if steps is None else steps)
        chosen = own if requested is None else requested
        return chosen if steps is None else replace(chosen, num_steps=steps)
    except ValueError as error:
        raise UserError(f"steps: {error}") from error
