"""--mode=import: a published checkpoint becomes a run of step 0."""

from __future__ import annotations

import pprint
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from ig_jax import experiment, pytree
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.config.run_config import parse
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.interop import alignment, declared, optimizer_state, original, parameter_names
from ig_jax.interop.declared import Declared
from ig_jax.interop.detect import Detected, detect
from ig_jax.interop.published_file import HEAD_LAYERS, TRAINING_ONLY
from ig_jax.io import files, state_dict
from ig_jax.io.state_dict import Found, TrainingFile
from ig_jax.monitoring import console
from ig_jax.optim.train_state import HEADS_OF_TERMS, TrainState, trained
from ig_jax.parallel.mesh import replicated
from ig_jax.pipeline import Pipeline
from ig_jax.types import Params

# Channels of the latents -> the published codec that has so many.
CODEC_OF = {4: "sd_vae", 32: "va_vae"}
# Their settings; those of the others are none. Each stores twice as many channels.
_CODECS = {
    "sd_vae": {"weights": None, "dtype": "float32"},
    "va_vae": {"weights": None, "dtype": "float32", "statistics": None},
}
# Settings of an optimizer that no training file holds.
NOT_IN_FILE = ("clip_norm", "warmup_steps", "schedule")

CONFIG = '''"""A published checkpoint as a run, written by --mode=import; docs/checkpoints.md.

On data: --config=<this file>:array_record --config.data.source.path=/data/latents, or another
source of configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import imagenet

IMPORTED = {file!r}


def get_config(source: str = "") -> ConfigDict:
    c = ConfigDict(
        {values}
    )
    if source:
        c.data = imagenet.on(c.data, source)
    return c
'''


def config_of(network: Detected, bases: Mapping[str, ConfigDict]) -> ConfigDict:
    """A complete run of a published network, on made-up latents of its shape."""
    c, facts = ConfigDict(bases[network.model["name"]].to_dict()), network.declared
    c.model = ConfigDict(network.model)
    codec = facts.codec or CODEC_OF.get(network.channels, "as_stored")
    settings = _CODECS.get(codec, {})
    stored = network.channels * (2 if settings else 1)
    source = {"side": network.side, "channels": stored, "num_classes": network.classes}
    c.data.source = ConfigDict({"name": "synthetic", "size": 1_281_167, **source})
    c.data.codec = ConfigDict({"name": codec, **settings})
    if settings:
        c.data.codec.rounding = facts.rounding
    c.process = _process(facts, bases)
    if network.model["name"] == "dit" and facts.process != "ddpm":
        # A DiT's own sampler and its loss of the variance go by DDPM's steps.
        c.sample.sampler = ConfigDict(bases["sit"].sample.sampler.to_dict())
        del c.objective.terms.variational_bound
    if facts.label_drop is not None:
        c.objective.label_drop = facts.label_drop
    if not c.objective.label_drop:
        c.sample.cfg.scale = 1.0
    c.sample.cfg.channels = min(c.sample.cfg.channels, network.channels)
    if not network.model["readouts"]:
        c.sample.ig.scale = 1.0
        if "internal_guidance" in c.objective.terms:
            del c.objective.terms.internal_guidance
    if network.alignment_head:
        term = alignment.term_settings(network.model["name"], network.model["depth"])
        c.objective.terms.self_alignment = ConfigDict(term)
    return c


def _process(facts: Declared, bases: Mapping[str, ConfigDict]) -> ConfigDict:
    processes = {base.process.name: base.process.to_dict() for base in bases.values()}
    settings = {"path": facts.path, "prediction": facts.prediction}
    stated = {name: value for name, value in settings.items() if value}
    return ConfigDict(processes[facts.process] | stated)


def import_checkpoint(
    file: Path,
    workdir: Path,
    bases: Mapping[str, ConfigDict],
    *,
    part: str = "",
    training_state: bool = False,
    **flags: Any,
) -> Path:
    """Writes a published network to `workdir` as a checkpoint of step 0, with its config.

    Args:
      file: see `state_dict.read`.
      workdir: must hold no run yet.
      bases: family of networks -> everything that a file does not say.
      part: which of the networks in the file; '': the averaged one, or the only one.
      training_state: take the raw weights, all averages and the optimizer's state, to train on.
      flags: what the file does not say, see `declared.of_flags`.

    Returns:
      The config file that was written.

    Raises:
      UserError: the file is not readable, not known, or its parts do not belong together; more
        must be given, or what is given is wrong; the workdir holds a run.
    """
    _check_workdir(workdir)
    if training_state and part:
        raise UserError(f"--part={part}: --training_state takes all parts; leave one of them out")
    training = state_dict.read_training(file, "--checkpoint") if training_state else None
    read = Found("ema", training.ema) if training else state_dict.read(file, "--checkpoint", part)
    notes = list(read.notes)
    try:
        network = _detected(read, flags)
        notes += network.notes
        c, optimizer = config_of(network, bases), None
        if training:
            optimizer = _optimizer(training, network)
            c.optim = ConfigDict({name: c.optim[name] for name in NOT_IN_FILE} | optimizer.settings)
            notes.append(_trained_for(training, optimizer, file))
        if network.alignment_head:
            notes.append(alignment.note(c.objective.terms.self_alignment.to_dict()))
        exp = experiment.experiment(parse(c), jax.devices()[:1])
        kept = original.of(read.state, network)
        read.state.clear()
        state = _laid_out(read.key, network, exp, training, optimizer)
    except UserError as error:
        raise UserError(f"--checkpoint={file}: {error}") from error
    # The checkpoint last: it is what makes the workdir a run.
    workdir.mkdir(parents=True, exist_ok=True)
    original.save(workdir, kept)
    config = _write_config(exp.config.raw, file, workdir)
    _save(state, exp.config.raw, workdir)
    size = f"{network.model['name']}, {pytree.count(state.params):,} parameters"
    for line in [f"{file}: {size}, from {read.key!r}", _sizes(network), *notes]:
        console.say(line)
    console.say(f"sample it: {_command(config, workdir)}")
    return config


def open_published(
    file: Path, bases: Mapping[str, ConfigDict], *, part: str = "", **flags: Any
) -> Pipeline:
    """A published network as a pipeline on all devices; writes nothing.

    Args:
      file, bases, part, flags: see `import_checkpoint`.

    Raises:
      UserError: as `import_checkpoint`.
    """
    read = state_dict.read(file, "--checkpoint", part)
    try:
        network = _detected(read, flags)
        exp = experiment.experiment(parse(config_of(network, bases)))
        read.state.clear()
        lay_out = _LayOut(replicated(exp.local_mesh))
        params = lay_out(read.key, network.state, exp.abstract_params)
        lay_out.check()
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    for line in [*read.notes, *network.notes]:
        console.say(line)
    return replace(exp.pipeline, params=params)


def _detected(read: Found, flags: Mapping[str, Any]) -> Detected:
    described = declared.of_metadata(read.metadata)
    return detect(read.state, declared.together(declared.of_flags(**flags), described))


def _check_workdir(workdir: Path) -> None:
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: holds a run already; name another")
    checkpoint_manager.check_folder(workdir)
    if ":" in str(workdir.absolute()):
        raise UserError(
            f"--workdir={workdir}: has a colon in its path, which --config takes for the start of "
            "a variant's name; choose another"
        )


def _sizes(network: Detected) -> str:
    return (
        f"depth {network.model['depth']}, width {network.model['hidden_size']}, "
        f"heads {network.model['num_heads']}, patch {network.model['patch_size']}, latents "
        f"{network.side} x {network.side} x {network.channels}, {network.classes} classes, "
        f"readouts {network.model['readouts']}"
    )


def _write_config(raw: Mapping[str, Any], file: Path, workdir: Path) -> Path:
    """The config file beside the checkpoint. A name in it is only ever a name: all go by repr."""
    path = workdir / "config.py"
    values = pprint.pformat(dict(raw), indent=1, width=90, sort_dicts=False)
    files.write_text(path, CONFIG.format(file=file.name, values=values))
    return path


def _command(config: Path, workdir: Path) -> str:
    """Flags as a shell takes them, from any folder."""
    flags = (f"--config={config.absolute()}", f"--workdir={workdir.absolute()}", "--mode=sample")
    return shlex.join(flags)


@dataclass(frozen=True)
class _LayOut:
    """Lays published arrays out as ours, on the devices, and collects all that does not fit."""

    placed: NamedSharding
    problems: list[str] = field(default_factory=list)

    def __call__(self, part: str, arrays: dict[str, np.ndarray], like: Params) -> Params:
        """`arrays` of this part of the file as `like`; empties it, as an XL network is 2.7 GB."""
        try:
            leaves = pytree.flatten(parameter_names.from_published(arrays, like))
        except ValueError as error:
            self.problems.append(f"{part}: {error}")
            return like
        arrays.clear()
        placed = {}
        for name in list(leaves):
            # One by one, forgetting each: small ones are views, which keep the whole file mapped.
            placed[name] = jax.device_put(np.array(leaves.pop(name), np.float32), self.placed)
        return pytree.unflatten(placed)

    def check(self) -> None:
        """Raises a UserError if anything did not fit."""
        if self.problems:
            raise UserError("; ".join(self.problems))


def _optimizer(training: TrainingFile, network: Detected) -> optimizer_state.Published:
    if any(array is not training.ema[name] for name, array in network.state.items()):
        raise UserError(
            "the weights of this network are converted, which the moments of its optimizer cannot "
            "be; import the weights alone, without --training_state"
        )
    try:
        return optimizer_state.read(training.opt, training.model, network.alignment_head)
    except ValueError as error:
        raise UserError(str(error)) from error


def _trained_for(training: TrainingFile, optimizer: optimizer_state.Published, file: Path) -> str:
    """Describes the length of the published run; LightningDiT's files have it in their names."""
    steps = training.steps
    if steps is None:
        steps = int(file.stem) if re.fullmatch(r"[0-9]{7,}", file.stem) else optimizer.updates
    return (
        f"trained for {steps:,} steps; {optimizer.settings['name']} goes on after "
        f"{optimizer.updates:,} updates, and the run that trains on counts from 0"
    )


def _laid_out(
    key: str,
    network: Detected,
    exp: Experiment,
    training: TrainingFile | None,
    optimizer: optimizer_state.Published | None,
) -> TrainState:
    """The state of step 0, on the device; empties `network`.

    Args:
      key: of the network in its file.
      network: as published.
      exp: the run that it becomes.
      training, optimizer: all that the file holds, to train on; None for the weights alone.
    """
    lay_out = _LayOut(replicated(exp.mesh))
    params = lay_out(key, network.state, exp.abstract_params)
    if training:
        state = _whole_state(training, optimizer, params, exp, lay_out)
    else:
        terms = _terms(key, network.alignment_head, exp, lay_out)
        state = TrainState(np.int32(0), params, opt_state=None, ema=None, terms=terms)
    lay_out.check()
    return jax.device_put(state, lay_out.placed)


def _whole_state(
    training: TrainingFile,
    optimizer: optimizer_state.Published,
    average: Params,
    exp: Experiment,
    lay_out: _LayOut,
) -> TrainState:
    """All that the file holds, as the state from which our training goes on."""
    raw = {n: a for n, a in training.model.items() if not n.startswith(TRAINING_ONLY)}
    params = lay_out("model", raw, exp.abstract_params)
    head = {n: a for n, a in training.model.items() if n.startswith(HEAD_LAYERS)}
    terms = _terms("model", head, exp, lay_out)
    like = jax.eval_shape(exp.optimizer.init, trained(exp.abstract_params, exp.abstract_terms))
    opt_state = optimizer_state.fill(optimizer, like, lay_out)
    averages = {name: average for name in exp.config.train.averages}
    return TrainState(np.int32(0), params, opt_state, averages, terms)


def _terms(part: str, head: dict[str, np.ndarray], exp: Experiment, lay_out: _LayOut) -> Params:
    """The file's head as that of the term that trains it; {} without such a term."""
    if not exp.abstract_terms:
        return {}
    return lay_out(part, head, {HEADS_OF_TERMS: exp.abstract_terms})[HEADS_OF_TERMS]


def _save(state: TrainState, raw: Mapping[str, Any], workdir: Path) -> None:
    """A checkpoint of step 0."""
    checkpoints = Checkpoints(workdir)
    imported = "weights" if state.opt_state is None else "state"
    checkpoints.save(state, {"examples": 0}, raw, imported)
    checkpoints.wait()
    checkpoints.close()
