"""Changes of a resumed run's settings: reported, because its curves will show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from ig_jax import optim
from ig_jax.checkpoint import compatibility
from ig_jax.config.parser import make
from ig_jax.config.schema import Train
from ig_jax.errors import UserError, shown
from ig_jax.experiment import Experiment


def require_length(exp: Experiment, old: Mapping[str, Any], step: int, examples: int) -> None:
    """Raises UserError where batches of another size leave open how long a run is.

    Args:
      exp, old, step: as for `describe_changes`.
      examples: seen before the step.
    """
    train, before = exp.config.train, old["train"]["batch_size"]
    if train.batch_size == before:
        return
    said = f"train.batch_size = {train.batch_size}: was {before} until step {step}, so that "
    falling = [name for name, term in exp.config.objective.terms.items() if term.weight_factor != 1]
    if falling:
        raise UserError(
            f"{said}the epochs by which the weight of {falling[0]} changes are no longer known by "
            f"the step; keep it, or train another run from these weights (--init_from)"
        )
    if train.steps is None:
        name, whole = train.length_in_images(len(exp.config.data.source))
        left = max(0, -int(-(whole - examples) // train.batch_size))
        raise UserError(
            f"{said}train.{name} no longer gives the number of steps; give it: --config.train."
            f"{name}=0 --config.train.steps={step + left} is as many {name}"
        )


def describe_changes(exp: Experiment, old: Mapping[str, Any], step: int) -> list[str]:
    """A line for each change.

    Args:
      exp: the run as it goes on.
      old: the raw config under which its checkpoint was made, of which `compatible.mismatches`
        finds no fault.
      step: of the checkpoint.
    """
    new = exp.config.raw
    lines = [
        f"{field}: {shown(before)} before, {shown(now)} from step {step} on"
        for field, before, now in compatibility.changes(old, new)
    ]
    (before, peak, steps), (now, peak_now, steps_now) = _schedule(exp, old), _schedule(exp, new)
    # Where the peak alone is another, its own line says it all.
    if not np.isclose(before(step) / peak, now(step) / peak_now, rtol=1e-6, atol=0):
        lines.append(
            f"the learning rate jumps from {before(step):.3g} to {now(step):.3g} at step {step}: "
            f"optim.schedule was {old['optim']['schedule']} over {steps:,} steps, and is "
            f"{new['optim']['schedule']} over {steps_now:,} from here on"
        )
    return lines


def _schedule(exp: Experiment, raw: Mapping[str, Any]) -> tuple[optax.Schedule, float, int]:
    """Updates done -> rate of the next, its peak, and the steps it is made for, of a raw config."""
    fields = {name: value for name, value in raw["optim"].items() if name != "name"}
    settings = make(type(exp.config.optim), fields, "optim")
    steps = make(Train, raw["train"], "train").total_steps(len(exp.config.data.source))
    return optim.learning_rate(settings, steps), settings.learning_rate, steps
