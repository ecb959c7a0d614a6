"""--mode=ema: the average of a length that no checkpoint holds, composed of stored ones."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ig_jax.checkpoint import compatibility, stored_averages
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.errors import UserError, shown
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors
from ig_jax.monitoring import console
from ig_jax.optim import ema


def run(exp: Experiment, workdir: Path) -> Path | None:
    """Composes what `sample.weights` names, of the newest checkpoint's step.

    Returns:
      The file; None where every checkpoint holds this average.

    Raises:
      UserError: `sample.weights` names no length; nothing is stored; the disk is full or gone.
    """
    which = exp.config.sample.weights
    length = ema.length(which)
    if length is None:
        raise UserError(
            f"sample.weights = {shown(which)}: must name the length to compose in --mode=ema, such "
            "as sigma_rel_0.08, of a run with train.ema_sigma_rel"
        )
    with closing(checkpoint_manager.of_run(workdir, "--workdir")) as checkpoints:
        step, _ = checkpoints.newest(arrays=("ema",))
        checkpoints.require(step, exp.config.raw, compatibility.SAMPLES)
        name, like = ema.name_of_length(length), exp.replicated_params
        with disk_errors.reported(workdir):
            file = stored_averages.compose(checkpoints, step, name, like)
    if file is None:
        console.say(f"{which}: every checkpoint of the run holds it; nothing is to be composed")
    return file
