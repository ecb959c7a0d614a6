"""The network that autoguidance extrapolates from: another run, or this one earlier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.config.schema import Guide, Sample
from ig_jax.errors import UserError
from ig_jax.experiment import open_pipeline
from ig_jax.guidance import GuideModel
from ig_jax.pipeline import Pipeline, require_same_data


@contextmanager
def _opened(guide: Guide) -> Iterator[tuple[Checkpoints, int]]:
    """The checkpoints of `sample.guide.workdir`, and the step that is meant.

    Raises:
      UserError: there is no such run, or no such checkpoint.
    """
    if guide.workdir is None:
        raise UserError(
            "sample.guide.workdir = None: autoguidance needs a worse network; name its run"
        )
    checkpoints = checkpoint_manager.of_run(Path(guide.workdir), "sample.guide.workdir")
    try:
        step = guide.step
        if step is None:
            step, _ = checkpoints.newest(arrays=checkpoint_manager.WEIGHTS)
        checkpoints.require_step(step, "sample.guide.step")
        yield checkpoints, step
    finally:
        checkpoints.close()


def record(sampling: Sample) -> dict[str, Any] | None:
    """Settings of the guide that decide how samples look, its step by number; None if it is off."""
    if sampling.autoguidance.scale == 1:
        return None
    with _opened(sampling.guide) as (_, step):
        return {**asdict(sampling.guide), "step": step}


def load(pipeline: Pipeline, *, wanted: bool | None = None) -> GuideModel | None:
    """The network that `pipeline.sampling.guide` names.

    Returns:
      None where it is not `wanted`, by default where autoguidance is off.

    Raises:
      UserError: its run is missing, or does not fit: other latents, other classes, another path.
    """
    sampling = pipeline.sampling
    if not (sampling.autoguidance.scale != 1 if wanted is None else wanted):
        return None
    guide = sampling.guide
    devices = pipeline.mesh.devices.ravel().tolist()
    with _opened(guide) as (checkpoints, step):
        other = open_pipeline(checkpoints, step, guide.weights, "sample.guide.weights", devices)
    require_same_data(pipeline, other, f"sample.guide.workdir = {guide.workdir}")
    return other.guide_model
