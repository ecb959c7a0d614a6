"""Files of the averages that --mode=ema composes: `ema/` of a workdir, by step and length."""

from __future__ import annotations

from pathlib import Path

import jax

from ig_jax.checkpoint.state_file import StateFile
from ig_jax.errors import UserError
from ig_jax.optim import ema
from ig_jax.types import Params

FOLDER = "ema"


def state_file(workdir: Path, step: int, name: str) -> StateFile:
    """The file of an average, by its name (`ema.name_of_length`)."""
    return StateFile(workdir / FOLDER / f"step_{step:08d}_{name}.npz")


def read(workdir: Path, step: int, sigma_rel: float, like: Params) -> Params:
    """An average, its leaves placed as those of `like`, which are abstract.

    Raises:
      UserError: it is to be composed first.
    """
    name = ema.name_of_length(sigma_rel)
    found = state_file(workdir, step, name).load(like)
    if found is None:
        raise UserError(
            f"sample.weights = {name!r}: is not composed yet of {workdir} at step {step}; run "
            f"--mode=ema --workdir={workdir} --config.sample.weights={name}"
        )
    return jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), found, like)


def forget_after(workdir: Path, step: int) -> None:
    """Removes those of steps later than `step`."""
    for file in (workdir / FOLDER).glob("step_*.npz"):
        if int(file.name.split("_")[1]) > step:
            file.unlink()
