"""--mode=import: a published checkpoint becomes a run of step 0."""

from __future__ import annotations

import pprint
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from ig_jax import build, ema, logs, sharding, tree
from ig_jax.build import Experiment
from ig_jax.checkpoint import Checkpoints, TrainState
from ig_jax.config import parse
from ig_jax.errors import UserError
from ig_jax.formats import state_dict
from ig_jax.formats.state_dict import Training
from ig_jax.interop import names, optimizer_state
from ig_jax.interop.recognise import TRAINING_ONLY, Recognised, recognise
from ig_jax.types import Params

# Channels of the latents -> the published codec that has so many, and stores twice as many.
CODECS = {
    4: {"name": "sd_vae", "weights": "", "dtype": "float32"},
    32: {"name": "va_vae", "weights": "", "dtype": "float32", "statistics": ""},
}
# Settings of an optimizer that no training file tells.
UNTOLD = ("clip_norm", "warmup_steps", "schedule")

CONFIG = '''"""{title}

  python main.py --config={path} --workdir={workdir} --mode=sample
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {values}
    )
'''


def _config(found: Recognised, bases: Mapping[str, ConfigDict]) -> ConfigDict:
    """A complete run of the network that was found, on made-up latents of its shape."""
    c = ConfigDict(bases[found.model["name"]].to_dict())
    c.model = ConfigDict(found.model)
    codec = CODECS.get(found.channels, {"name": "as_stored"})
    stored = found.channels * (2 if found.channels in CODECS else 1)
    source = {"side": found.side, "channels": stored, "num_classes": found.classes}
    c.data.source = ConfigDict({"name": "synthetic", "size": 1_281_167, **source})
    c.data.codec = ConfigDict(codec)
    if not found.model["readouts"]:
        c.sample.ig.scale = 1.0
        if "internal_guidance" in c.objective.terms:
            del c.objective.terms.internal_guidance
    return c


def import_(
    file: Path,
    workdir: Path,
    bases: Mapping[str, ConfigDict],
    *,
    readout_depth: int = 0,
    family: str = "",
    training_state: bool = False,
) -> Path:
    """Writes a published network to `workdir` as a checkpoint of step 0, with its config.

    Args:
      file: .pt, .pth or .safetensors; averaged weights are preferred where it has several.
      workdir: must hold no run yet.
      bases: family of networks -> everything that a file does not say.
      readout_depth, family: what must be told, see `recognise`.
      training_state: take the raw weights, all averages and the optimizer's state, to train on.

    Returns:
      The config file that was written.

    Raises:
      UserError: the file is not readable, not known, or its parts do not belong together; the
        workdir holds a run.
    """
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: holds a run already; name another")
    training = state_dict.read_training(file, "--checkpoint") if training_state else None
    key, state = ("ema", training.ema) if training else state_dict.read(file, "--checkpoint")
    found = recognise(state, readout_depth, family)
    c = _config(found, bases)
    notes = found.notes
    if training:
        optimizer = _optimizer(training, found, file)
        c.optim = ConfigDict({name: c.optim[name] for name in UNTOLD} | optimizer.settings)
        notes = [*notes, _trained_for(training, optimizer, file)]
    exp = build.experiment(parse(c), jax.devices()[:1])
    state.clear()
    lay_out = _LayOut(sharding.replicated(exp.mesh))
    params = lay_out(key, found.state, exp.abstract_params)
    if training:
        imported = _whole_state(training, optimizer, params, exp, lay_out)
    else:
        imported = TrainState(np.int32(0), params, opt_state=None, ema=None)
    lay_out.check(file)
    _save(jax.device_put(imported, lay_out.placed), c, workdir)
    logs.say(f"{file}: {found.model['name']}, {tree.count(params):,} parameters, from {key!r}")
    for line in [_sizes(found), *notes]:
        logs.say(line)
    return _write_config(c, file, workdir)


def _sizes(found: Recognised) -> str:
    return (
        f"depth {found.model['depth']}, width {found.model['hidden_size']}, "
        f"heads {found.model['num_heads']}, patch {found.model['patch_size']}, latents "
        f"{found.side} x {found.side} x {found.channels}, {found.classes} classes, readouts "
        f"{found.model['readouts']}"
    )


def _write_config(c: ConfigDict, file: Path, workdir: Path) -> Path:
    """The config file beside the checkpoint; says how to use it."""
    path = workdir / "config.py"
    values = pprint.pformat(c.to_dict(), indent=1, width=90, sort_dicts=False)
    title = f"Imported from {file.name}."
    path.write_text(CONFIG.format(title=title, path=path, workdir=workdir, values=values))
    logs.say(f"sample it: --config={path} --workdir={workdir} --mode=sample")
    return path


@dataclass(frozen=True)
class _LayOut:
    """Lays published arrays out as ours, on the devices, and collects all that does not fit."""

    placed: NamedSharding
    problems: list[str] = field(default_factory=list)

    def __call__(self, part: str, arrays: dict[str, np.ndarray], like: Params) -> Params:
        """`arrays` of this part of the file as `like`; empties it, as an XL network is 2.7 GB."""
        try:
            leaves = tree.flatten(names.from_published(arrays, like))
        except ValueError as error:
            self.problems.append(f"{part}: {error}")
            return like
        arrays.clear()
        placed = {}
        for name in list(leaves):
            # One by one, forgetting each: small ones are views, which keep the whole file mapped.
            placed[name] = jax.device_put(np.array(leaves.pop(name), np.float32), self.placed)
        return tree.unflatten(placed)

    def check(self, file: Path) -> None:
        """Raises a UserError if anything did not fit."""
        if self.problems:
            raise UserError(f"--checkpoint={file}: {'; '.join(self.problems)}")


def _optimizer(training: Training, found: Recognised, file: Path) -> optimizer_state.Published:
    if any(array is not training.ema[name] for name, array in found.state.items()):
        raise UserError(
            f"--checkpoint={file}: the weights of this network are converted, which the moments of "
            "its optimizer cannot be; import the weights alone, without --training_state"
        )
    try:
        return optimizer_state.read(training.opt, training.model)
    except ValueError as error:
        raise UserError(f"--checkpoint={file}: {error}") from error


def _trained_for(training: Training, optimizer: optimizer_state.Published, file: Path) -> str:
    """How long the published run was, in a line; LightningDiT's files tell it by their names."""
    steps = training.steps
    if steps is None:
        steps = int(file.stem) if re.fullmatch(r"[0-9]{7,}", file.stem) else optimizer.updates
    return (
        f"trained for {steps:,} steps; {optimizer.settings['name']} goes on after "
        f"{optimizer.updates:,} updates, and the run that trains on counts from 0"
    )


def _whole_state(
    training: Training,
    optimizer: optimizer_state.Published,
    average: Params,
    exp: Experiment,
    lay_out: _LayOut,
) -> TrainState:
    """All that the file holds, as the state from which our training goes on."""
    raw = {n: a for n, a in training.model.items() if not n.startswith(TRAINING_ONLY)}
    params = lay_out("model", raw, exp.abstract_params)
    like = jax.eval_shape(exp.optimizer.init, exp.abstract_params)
    opt_state = optimizer_state.fill(optimizer, like, lay_out)
    averages = {ema.name(decay): average for decay in exp.config.train.ema_decays}
    return TrainState(np.int32(0), params, opt_state, averages)


def _save(state: TrainState, c: ConfigDict, workdir: Path) -> None:
    """A checkpoint of step 0."""
    checkpoints = Checkpoints(workdir)
    imported = "weights" if state.opt_state is None else "state"
    checkpoints.save(state, {"next_index": 0}, c.to_dict(), imported)
    checkpoints.wait()
    checkpoints.close()
