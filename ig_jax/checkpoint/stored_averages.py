"""Power-function averages that training stores beside the checkpoints.

`averages/` holds those of `train.ema_sigma_rel` at every `checkpoint.averages_every_steps`, nothing
else of the state; --mode=ema composes others of them. They outlive the checkpoints of their steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax.checkpoint import composed_average, unreadable
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.errors import UserError
from ig_jax.monitoring import console
from ig_jax.optim import ema, power_ema
from ig_jax.optim.power_ema import Profile
from ig_jax.optim.train_state import TrainState
from ig_jax.parallel.processes import barrier
from ig_jax.types import Params

FOLDER = "averages"
_ALL = 10**9
_MUCH = 0.05  # of a weighting that a composition misses


def opened(workdir: Path, *, reading: bool = False) -> Checkpoints:
    """The stored averages of a run, as checkpoints without other items."""
    return Checkpoints(workdir, keep_last=_ALL, reading=reading, folder=FOLDER)


class StoredAverages:
    """Those of a run that trains."""

    def __init__(self, workdir: Path, step: int):
        """Forgets what was stored or composed of steps later than `step`, where the run goes on."""
        self._stored = opened(workdir)
        for later in self._stored.all_steps():
            if later > step:
                self._stored.remove(later)
        if jax.process_index() == 0:
            composed_average.forget_after(workdir, step)
        barrier("averages of later steps are forgotten")

    def save(self, state: TrainState, seen: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """As `Checkpoints.save`, of the power-function averages alone."""
        kept = {name: x for name, x in state.ema.items() if ema.length(name) is not None}
        rest = {"params": None, "opt_state": None, "terms": {}, "ema_terms": {}}
        self._stored.save(state.replace(ema=kept, **rest), seen, config)

    def close(self) -> None:
        self._stored.close()


def compose(checkpoints: Checkpoints, step: int, name: str, like: Params) -> Path | None:
    """Composes the average `name` (`ema.name_of_length`) of a step that has a checkpoint.

    Args:
      like: parameters, whose leaves may be abstract, and say where averages are read to.

    Returns:
      Its file, which is written again where it is there; None where the checkpoint holds it.

    Raises:
      UserError: the run stored no averages.
    """
    train = checkpoints.meta(step)["config"]["train"]
    if name in ema.in_config(train):
        return None
    workdir = checkpoints.workdir
    if not (workdir / FOLDER).is_dir():
        raise UserError(
            f"--workdir={workdir}: its training stored no averages; train with "
            "train.ema_sigma_rel and checkpoint.averages_every_steps"
        )
    with closing(opened(workdir, reading=True)) as stored:
        earlier = [at for at in stored.all_steps() if at < step and _is_whole(stored, at)]
        places = [*((stored, at) for at in earlier), (checkpoints, step)]
        return _compose(places, train, name, like)


def _is_whole(stored: Checkpoints, step: int) -> bool:
    fault = unreadable.damage(stored.directory / str(step), ("ema",))
    if fault:
        console.say(f"{stored.directory / str(step)} cannot be read ({fault}): left out")
    return not fault


def _compose(
    places: list[tuple[Checkpoints, int]], train: Mapping[str, Any], name: str, like: Params
) -> Path:
    """`compose` of the averages at these places, the last one the checkpoint's."""
    checkpoints, step = places[-1]
    lengths = train["ema_sigma_rel"]
    profiles = [Profile(length, at) for _, at in places for length in lengths]
    coefficients, error = power_ema.compose(profiles, Profile(ema.length(name), step))
    names, total = [ema.name_of_length(length) for length in lengths], None
    with console.progress(len(profiles), unit="average", what="composing") as bar:
        for number, (source, at) in enumerate(places):
            held = ema.in_config(train) if source is checkpoints else names
            averages = source.averages(at, held, like)
            for place, stored_name in enumerate(names, number * len(names)):
                share = np.float32(coefficients[place])
                part = jax.tree.map(lambda x, w=share: w * np.asarray(x), averages[stored_name])
                total = part if total is None else jax.tree.map(np.add, total, part)
                bar.update(1)
    file = composed_average.state_file(checkpoints.workdir, step, name)
    file.path.parent.mkdir(exist_ok=True)
    file.save(total)
    said = (
        f"{file.path}: {name} at step {step:,}, of {len(profiles)} averages at {len(places)} "
        f"steps; {error:.1%} of its weighting is missed"
    )
    advice = "; store averages more often, or choose a length nearer to those stored"
    console.say(said + (advice if error > _MUCH else ""))
    return file.path
