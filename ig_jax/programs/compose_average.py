"""--mode=ema: the average of a length that no checkpoint holds, composed of stored ones."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import numpy as np

from ig_jax.checkpoint import compatibility, composed_average, stored_averages, unreadable
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.errors import UserError, shown
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors
from ig_jax.monitoring import console
from ig_jax.optim import ema, power_ema
from ig_jax.optim.power_ema import Profile

_MUCH = 0.05  # of a weighting that a composition misses


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
    if which in exp.config.train.averages:
        console.say(f"{which}: every checkpoint of the run holds it; nothing is to be composed")
        return None
    with closing(checkpoint_manager.of_run(workdir, "--workdir")) as checkpoints:
        step, _ = checkpoints.newest(arrays=("ema",))
        checkpoints.require(step, exp.config.raw, compatibility.SAMPLES)
        with closing(_stored(workdir)) as stored, disk_errors.reported(workdir):
            return _compose(exp, workdir, checkpoints, stored, step, length)


def _stored(workdir: Path) -> Checkpoints:
    if not (workdir / stored_averages.FOLDER).is_dir():
        raise UserError(
            f"--workdir={workdir}: its training stored no averages; train with "
            "train.ema_sigma_rel and checkpoint.averages_every_steps"
        )
    return stored_averages.opened(workdir, reading=True)


def _is_whole(stored: Checkpoints, step: int) -> bool:
    fault = unreadable.damage(stored.directory / str(step), ("ema",))
    if fault:
        console.say(f"{stored.directory / str(step)} cannot be read ({fault}): left out")
    return not fault


def _compose(
    exp: Experiment,
    workdir: Path,
    checkpoints: Checkpoints,
    stored: Checkpoints,
    step: int,
    length: float,
) -> Path:
    steps = [
        earlier for earlier in stored.all_steps() if earlier < step and _is_whole(stored, earlier)
    ]
    lengths = exp.config.train.ema_sigma_rel
    profiles = [Profile(each, s) for s in (*steps, step) for each in lengths]
    coefficients, error = power_ema.compose(profiles, Profile(length, step))
    like, total = exp.replicated_params, None
    names = [ema.name_of_length(each) for each in lengths]
    with console.progress(len(profiles), unit="average", what="composing") as bar:
        for number, at in enumerate((*steps, step)):
            source = checkpoints if at == step else stored
            held = exp.config.train.averages if at == step else names
            averages = source.averages(at, held, like)
            for place, name in enumerate(names, number * len(names)):
                share = partial(np.multiply, np.float32(coefficients[place]))
                part = jax.tree.map(lambda x, share=share: share(np.asarray(x)), averages[name])
                total = part if total is None else jax.tree.map(np.add, total, part)
                bar.update(1)
    name = ema.name_of_length(length)
    file = composed_average.state_file(workdir, step, name)
    file.path.parent.mkdir(exist_ok=True)
    file.save(total)
    said = (
        f"{file.path}: {name} at step {step:,}, of {len(profiles)} averages at {len(steps) + 1} "
        f"steps; {error:.1%} of its weighting is missed"
    )
    advice = "; store averages more often, or choose a length nearer to those stored"
    console.say(said + (advice if error > _MUCH else ""))
    return file.path
