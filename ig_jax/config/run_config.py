"""From a ConfigDict to frozen dataclasses, once, at the door.

The rules of a whole run are here, those of a section in `schema.py`, how a section becomes a
dataclass in `parser.py`. Every complaint is one sentence: the dotted field, the value, the rule
and a way out. Below this file nobody sees a ConfigDict. Field documentation lives in
`configs/base.py`, which also gives every default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections
import numpy as np

from ig_jax.bounds import at_most
from ig_jax.codecs.autoencoders import INPUT_RANGE
from ig_jax.config.parser import ConfigError, make, named, plain, recorded, require
from ig_jax.config.probe import DEFAULTS as PROBE_DEFAULTS
from ig_jax.config.probe import Probe
from ig_jax.config.schema import (
    SEED_RULE,
    SEEDS,
    CheckpointSettings,
    Data,
    Evaluate,
    Log,
    MeshSettings,
    ObjectiveSettings,
    Prepare,
    ProfileSettings,
    Sample,
    SearchSettings,
    Train,
    Visualize,
    class_numbers,
)
from ig_jax.config.studies import NO_SELECTION, NO_STUDY, Select, Study
from ig_jax.data.sources.image_folder import MOST_CLASSES
from ig_jax.diffusion import PROCESSES
from ig_jax.diffusion.ddpm import DDPM
from ig_jax.errors import LONGEST_SHOWN, shown
from ig_jax.models import MODELS
from ig_jax.models.self_conditioning import SEPARATED
from ig_jax.objectives.internal_guidance import InternalGuidance
from ig_jax.optim import OPTIMIZERS, ema
from ig_jax.samplers import base as samplers
from ig_jax.types import Encoded, Process


@dataclass(frozen=True)
class Config:
    """A whole run. Sections are described in `configs/base.py`."""

    seed: int = at_most(SEEDS - 1)
    data: Data
    objective: ObjectiveSettings
    train: Train
    checkpoint: CheckpointSettings
    log: Log
    sample: Sample
    evaluate: Evaluate
    search: SearchSettings
    model: Any = named({name: settings for name, (settings, _) in MODELS.items()})
    process: Process = named(PROCESSES)
    optim: Any = named({name: settings for name, (settings, _) in OPTIMIZERS.items()})
    # Configs of runs older than these lack them.
    prepare: Prepare = Prepare("array_record", 64, 10_000, "stop")
    mesh: MeshSettings = MeshSettings(-1, 1, 1)
    profile: ProfileSettings = ProfileSettings(0, 0)
    visualize: Visualize = Visualize(
        *(None, 4, "squash", (), (0.7, 0.5, 0.3, 0.1), None, 0, "layer_norm", "cell")
    )
    probe: Probe = PROBE_DEFAULTS
    study: Study = NO_STUDY
    select: Select = NO_SELECTION
    # The plain dict this was parsed from, as `parser.recorded` gives it: what is written to the
    # workdir and compared on resuming.
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        require(0 <= self.seed < SEEDS, "seed", self.seed, SEED_RULE)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.data.codec.latent_shape(self.data.source.stored_shape)

    @property
    def readout(self) -> int | None:
        """Depth of the head that Internal Guidance extrapolates from; None without one."""
        readouts = self.model.readouts
        return self.sample.readout or (readouts[0] if readouts else None)


def _check_latents(c: Config) -> None:
    """Checks that the codec is the one that made what the source holds."""
    source, codec = c.data.source, c.data.codec
    if not isinstance(source, Encoded) or not source.codec:
        return
    name, record = c.raw["data"]["codec"]["name"], source.record()
    if name != source.codec:
        raise ConfigError(
            f"data.codec.name = {name!r}: the latents of data.source were made by "
            f"{source.codec!r}; choose that codec, or other latents"
        )
    if record is None:
        return
    if record.input_range not in ((), INPUT_RANGE):
        raise ConfigError(
            f"data.source: its autoencoder saw pixels in {list(record.input_range)}, but "
            f"{name!r} means {list(INPUT_RANGE)}; prepare the latents again"
        )
    configured = getattr(codec, "statistics_per_channel", None)
    if configured is not None and not _alike(configured, (record.mean, record.std)):
        raise ConfigError(
            f"data.codec.statistics = {shown(codec.statistics)}: are not those of the latents of "
            "data.source; name the latents_stats.pt that lies beside them"
        )


def _alike(configured: Any, recorded: Any) -> bool:
    """Returns whether means and standard deviations could be those of the same latents.

    The published statistics are those of 10,000 random latents, ours of all: they differ by a few
    hundredths of a standard deviation.
    """
    (mean, std), (true_mean, true_std) = np.array(configured), np.array(recorded)
    if mean.shape != true_mean.shape:
        return False
    near = np.abs(mean - true_mean) <= 0.25 * true_std
    return bool(np.all(near) and np.all(np.abs(std / true_std - 1) <= 0.25))


def _check_model(c: Config) -> None:
    try:
        height, width, channels = c.latent_shape
    except ValueError as error:
        raise ConfigError(f"data.{error}") from error
    if height != width:
        raise ConfigError(f"data: latents are {height} x {width}; this model needs square ones")
    classes = c.data.source.num_classes
    rule = f"must be at most {MOST_CLASSES}"
    require(classes <= MOST_CLASSES, "data.source.num_classes", classes, rule)
    _, network = MODELS[c.raw["model"]["name"]]
    try:
        net = network(c.model, height, channels, classes)
    except ValueError as error:
        raise ConfigError(f"model.{error}") from error
    if c.model.self_conditioning and c.objective.groups.separate_attention:
        raise ConfigError(f"objective.groups.separate_attention = True: {SEPARATED}")
    predicts_variance = net.family.outputs > 1
    _check_terms(c, predicts_variance)
    try:
        samplers.check(c.sample.sampler, c.process, predicts_variance=predicts_variance)
    except ValueError as error:
        name = shown(c.raw["sample"]["sampler"]["name"])
        raise ConfigError(f"sample.sampler.name = {name}: {error}") from error
    try:
        c.sample.null_class.check(c.sample.sampler.adaptive)
        c.sample.token_groups.check(c.sample.sampler, c.model.num_tokens(height))
    except ValueError as error:
        raise ConfigError(f"sample.{error}") from error


def _check_terms(c: Config, predicts_variance: bool) -> None:
    for name, term in c.objective.terms.items():
        try:
            term.check(c.model.readouts)
            term.needs.check(c.model.depth)
            term.check_groups(c.objective.groups)
        except ValueError as error:
            raise ConfigError(f"objective.terms.{name}: {error}") from error
        if term.needs.variance and not isinstance(c.process, DDPM):
            raise ConfigError(
                f"objective.terms.{name}: bounds a step of DDPM, but process.name = "
                f"{shown(c.raw['process']['name'])} has no such steps; set it to ddpm, or remove "
                "this term"
            )
        if term.needs.variance and not predicts_variance:
            raise ConfigError(
                f"objective.terms.{name}: trains a variance, which model.name = "
                f"{shown(c.raw['model']['name'])} does not predict; set it to dit, or remove this "
                "term"
            )


def _check_sampling(c: Config) -> None:
    readouts, s = c.model.readouts, c.sample
    for kind, g in s.guidances.items():
        if g.channels > c.latent_shape[-1]:
            raise ConfigError(
                f"sample.{kind}.channels = {g.channels}: latents have {c.latent_shape[-1]}; "
                "0 guides all of them"
            )
    if s.ig.scale != 1 and not readouts:
        raise ConfigError(
            f"sample.ig.scale = {s.ig.scale}: needs an intermediate readout; name a depth in "
            "model.readouts, or set the scale to 1 (off)"
        )
    if s.readout is not None and s.readout not in readouts:
        raise ConfigError(
            f"sample.readout = {s.readout}: must be one of model.readouts = {shown(readouts)}, "
            "or None for the first of them"
        )
    if s.null_class.readout not in (None, *readouts):
        raise ConfigError(
            f"sample.null_class.readout = {s.null_class.readout}: must be one of model.readouts = "
            f"{shown(readouts)}, or None for the final output"
        )
    if c.model.self_conditioning and s.token_groups.share:
        raise ConfigError(f"sample.token_groups.share = {s.token_groups.share}: {SEPARATED}")
    classes = c.data.source.num_classes
    for label in s.class_numbers or []:
        if label > classes:
            raise ConfigError(
                f"sample.labels = {shown(s.labels)}: class {label} does not exist; there are "
                f"{classes} classes, 0 to {classes - 1}, and {classes} is the null class"
            )
    if s.cfg.scale != 1 and c.objective.label_drop == 0:
        raise ConfigError(
            f"sample.cfg.scale = {s.cfg.scale}: needs a network trained with dropped labels; set "
            "objective.label_drop above 0 (the reference uses 0.1), or the scale to 1 (off)"
        )
    if s.weights not in ("ema", "raw") and not c.train.has_average(s.weights):
        lengths = ", or sigma_rel_ and a length, such as sigma_rel_0.08"
        raise ConfigError(
            f"sample.weights = {shown(s.weights)}: must be ema (the first decay), raw, or one of "
            f"train.ema_decays = {shown(c.train.ema_decays)}"
            f"{lengths if c.train.ema_sigma_rel else ''}"
        )


def _check_averages(c: Config) -> None:
    lengths, every = c.train.ema_sigma_rel, c.checkpoint.averages_every_steps
    if bool(lengths) != bool(every):
        raise ConfigError(
            f"train.ema_sigma_rel = {lengths}, checkpoint.averages_every_steps = {every}: averages "
            "of other lengths are composed of stored ones; set both (a 50th of the run is a good "
            "interval), or neither: () and 0"
        )


def _check_only(c: Config) -> None:
    if c.train.only is None:
        return
    trains = any(isinstance(term, InternalGuidance) for term in c.objective.terms.values())
    if not c.model.readouts or not trains:
        missing = "objective.terms" if c.model.readouts else "model.readouts"
        has = "has no internal_guidance" if c.model.readouts else "names no depth"
        raise ConfigError(
            f"train.only = {c.train.only!r}: {missing} {has}, so that nothing would be trained; "
            "add it there, or set train.only to None"
        )


def _check_teacher(c: Config) -> None:
    decay, averages = c.objective.teacher_decay, c.train.ema_decays
    if decay is not None and ema.name(decay) not in map(ema.name, averages):
        raise ConfigError(
            f"objective.teacher_decay = {decay}: must be one of train.ema_decays = "
            f"{shown(averages)}; add it there, or leave it out for the first of them"
        )


def _check_visualize(c: Config) -> None:
    v, depth, classes = c.visualize, c.model.depth, c.data.source.num_classes
    rule = f"must lie in 1..{depth}, the model's depth"
    require(max(v.blocks, default=1) <= depth, "visualize.blocks", v.blocks, rule)
    numbers = [] if v.labels is None else class_numbers(v.labels)
    rule = f"must lie in 0..{classes - 1}, or be {classes} for the null class"
    require(max(numbers, default=0) <= classes, "visualize.labels", v.labels, rule)


def _check_probe(c: Config) -> None:
    blocks, depth = c.probe.blocks, c.model.depth
    rule = f"must lie in 1..{depth}, the model's depth"
    require(max(blocks, default=1) <= depth, "probe.blocks", blocks, rule)


def check_devices(c: Config, devices: int) -> None:
    """Raises ConfigError where the mesh or a batch does not divide over `devices`."""
    data, fsdp, _ = c.mesh.shape(devices)
    if fsdp > 1 and c.model.remat == "none":
        raise ConfigError(
            f"model.remat = 'none': would keep every weight that mesh.fsdp = {fsdp} devices "
            "gather until the backward pass; use dots or full"
        )
    parts = data * fsdp * c.train.accumulation
    if c.train.batch_size % parts:
        raise ConfigError(
            f"train.batch_size = {c.train.batch_size}: must divide over {data * fsdp} devices x "
            f"{c.train.accumulation} accumulation steps = {parts}; the next that does: "
            f"{-(-c.train.batch_size // parts) * parts}"
        )
    for name, term in c.objective.terms.items():
        try:
            term.check_rows(c.train.batch_size // parts)
        except ValueError as error:
            raise ConfigError(f"objective.terms.{name}: {error}") from error
        if term.needs.whole_batch:
            _check_whole_batch(c.train, name)
    if c.sample.batch_size % devices:
        raise ConfigError(
            f"sample.batch_size = {c.sample.batch_size}: must divide over {devices} devices; the "
            f"next that does: {-(-c.sample.batch_size // devices) * devices}"
        )


def _check_whole_batch(train: Train, name: str) -> None:
    """Raises ConfigError where a term could not see several images at once, all of a batch."""
    if train.batch_size < 2:
        raise ConfigError(
            f"objective.terms.{name}: compares the images of a batch, but train.batch_size = "
            f"{train.batch_size}; use at least 2"
        )
    if train.accumulation > 1:
        raise ConfigError(
            f"objective.terms.{name}: compares all images of a batch, but train.accumulation = "
            f"{train.accumulation} parts are never seen together; set it to 1, and save memory "
            "with model.remat or mesh.fsdp"
        )


def _plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    try:
        return plain(config.to_dict())
    except ConfigError:
        raise
    except Exception as error:  # a value computed from others, a required one without a value, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"the config cannot be read ({reason[:LONGEST_SHOWN]})") from error


def parse(config: ml_collections.ConfigDict, devices: int = 1) -> Config:
    """The validated form of a ConfigDict, for a run on `devices` devices.

    Raises:
      ConfigError: one sentence naming the field, the value, the rule and a way out.
    """
    raw = _plain(config)
    if isinstance(raw.get("data"), dict):
        raw["data"].pop("path", None)  # what data.source.path refers to in some configs
    parsed = make(Config, raw, "")
    parsed = dataclasses.replace(parsed, raw=recorded(parsed, raw))
    _check_latents(parsed)
    _check_model(parsed)
    _check_sampling(parsed)
    _check_teacher(parsed)
    _check_averages(parsed)
    _check_only(parsed)
    _check_visualize(parsed)
    _check_probe(parsed)
    check_devices(parsed, devices)
    return parsed
