"""Power-function averages beside the checkpoints: those stored while training, those composed.

`averages/` holds those of `train.ema_sigma_rel` at every `checkpoint.averages_every_steps`, nothing
else of the state; `ema/` what --mode=ema composed of them. Both outlive the checkpoints of their
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.checkpoint.state_file import StateFile
from ig_jax.errors import UserError
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState
from ig_jax.parallel.processes import barrier
from ig_jax.types import Params

FOLDER, COMPOSED = "averages", "ema"
_ALL = 10**9


def opened(workdir: Path, *, reading: bool = False) -> Checkpoints:
    """The stored averages of a run, as checkpoints without other items."""
    return Checkpoints(workdir, keep_last=_ALL, reading=reading, folder=FOLDER)


def composed(workdir: Path, step: int, name: str) -> StateFile:
    """The file of an average that --mode=ema composes."""
    return StateFile(workdir / COMPOSED / f"step_{step:08d}_{name}.npz")


def weights(checkpoints: Checkpoints, step: int, which: str, like: Params) -> Params:
    """As `Checkpoints.weights`, of composed averages too.

    Raises:
      UserError: there is no such average, or it is to be composed first.
    """
    length = ema.length(which)
    names = ema.in_config(checkpoints.meta(step)["config"]["train"])
    if length is None or which in names:
        return checkpoints.weights(step, which, like)
    workdir, name = checkpoints.workdir, ema.name_of_length(length)
    found = composed(workdir, step, name).load(like)
    if found is None:
        raise UserError(
            f"sample.weights = {which!r}: is not composed yet of {workdir} at step {step}; run "
            f"--mode=ema --workdir={workdir} --config.sample.weights={name}"
        )
    return jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), found, like)


class StoredAverages:
    """Those of a run that trains."""

    def __init__(self, workdir: Path, step: int):
        """Forgets what was stored or composed of steps later than `step`, where the run goes on."""
        self._stored = opened(workdir)
        for later in self._stored.all_steps():
            if later > step:
                self._stored.remove(later)
        if jax.process_index() == 0:
            for file in (workdir / COMPOSED).glob("step_*.npz"):
                if int(file.name.split("_")[1]) > step:
                    file.unlink()
        barrier("averages of later steps are forgotten")

    def save(self, state: TrainState, seen: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """As `Checkpoints.save`, of the power-function averages alone."""
        kept = {name: x for name, x in state.ema.items() if ema.length(name) is not None}
        rest = {"params": None, "opt_state": None, "terms": {}, "ema_terms": {}}
        self._stored.save(state.replace(ema=kept, **rest), seen, config)

    def close(self) -> None:
        self._stored.close()
