"""The worse network that autoguidance extrapolates from: another run, or this one earlier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ig_jax import experiment
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.errors import UserError, shown
from ig_jax.experiment import Experiment
from ig_jax.guidance import GuideModel
from ig_jax.optim import ema
from ig_jax.parallel.mesh import replicate_locally


def _open(exp: Experiment) -> tuple[Checkpoints, int]:
    """The checkpoints of `sample.guide.workdir`, to be closed, and the step that is meant."""
    s = exp.config.sample.guide
    checkpoints = checkpoint_manager.of_run(Path(s.workdir), "sample.guide.workdir")
    step = s.step or checkpoints.newest(arrays=checkpoint_manager.WEIGHTS)[0]
    if step not in checkpoints.all_steps():
        known = ", ".join(map(str, checkpoints.all_steps()))
        checkpoints.close()
        raise UserError(
            f"sample.guide.step = {step}: {s.workdir} holds no such checkpoint, only {known}"
        )
    return checkpoints, step


def record(exp: Experiment) -> dict[str, Any] | None:
    """What of it decides how samples look, its newest step by number; None where it is off."""
    if exp.config.sample.autoguidance.scale == 1:
        return None
    checkpoints, step = _open(exp)
    checkpoints.close()
    return {**exp.config.raw["sample"]["guide"], "step": step}


def _require_fit(exp: Experiment, other: Experiment) -> None:
    """Raises UserError unless both networks know the same data, and the same path to noise."""
    for what, here, there in (
        ("latents", exp.net.latent_shape, other.net.latent_shape),
        ("classes", exp.num_classes, other.num_classes),
        ("process.path", exp.config.process.path, other.config.process.path),
    ):
        if here != there:
            raise UserError(
                f"sample.guide.workdir = {exp.config.sample.guide.workdir}: its {what} are "
                f"{there}, this run's {here}; autoguidance needs two networks of the same data and "
                "path"
            )


def load(exp: Experiment, wanted: bool | None = None) -> GuideModel | None:
    """The other network; None where it is not `wanted`, by default where autoguidance is off.

    Raises:
      UserError: its run is missing, or does not fit: other latents, other classes, another path.
    """
    s = exp.config.sample
    if not (s.autoguidance.scale != 1 if wanted is None else wanted):
        return None
    checkpoints, step = _open(exp)
    try:
        other = experiment.of_checkpoint(checkpoints, step, exp.mesh.devices.ravel().tolist())
        _require_fit(exp, other)
        known = ("ema", "raw", *map(ema.name, other.config.train.ema_decays))
        if s.guide.weights not in known:
            raise UserError(
                f"sample.guide.weights = {shown(s.guide.weights)}: must be one of "
                f"{', '.join(known)}"
            )
        params = checkpoints.weights(step, s.guide.weights, other.weights_here)
        return GuideModel(other.net, other.config.process, replicate_locally(other.mesh, params))
    finally:
        checkpoints.close()
