"""The sections of a config as frozen dataclasses, each with the rules that concern it alone.

Documentation of the fields lives in `configs/base.py`, which also gives every default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ig_jax.bounds import BELOW_ONE, WHOLE, at_most, below_one, unset
from ig_jax.codecs import CODECS
from ig_jax.config.parser import ConfigError, each_named, named, optionally_named, require
from ig_jax.data import SOURCES
from ig_jax.data.latent_writers import LAYOUTS
from ig_jax.guidance import AT_EVERY_EVALUATION, KINDS, Guidance, Guidances, NullClass
from ig_jax.io.paths import Location
from ig_jax.metrics import FEATURES
from ig_jax.metrics.feature_space import FeatureSpace
from ig_jax.metrics.inception import Inception
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import Term
from ig_jax.objectives.token_groups import GroupSettings, SamplingGroups
from ig_jax.optim import ema, power_ema
from ig_jax.optim.train_state import PARTS
from ig_jax.plots.token_pca import BASES, TOKEN_NORMS
from ig_jax.samplers import SAMPLERS
from ig_jax.samplers.base import Sampler
from ig_jax.search.space import Space
from ig_jax.types import Codec, Source

LABEL_MODES = ("random", "balanced")
RESIZES = ("squash", "crop")
FILES = ("png", "npz")
ENOUGH = "must be at least 10 for a covariance to mean much"
SEEDS = 2**32
LARGEST_BATCH, MOST_SAMPLES, MOST_AVERAGES, MOST_TIMES = 2**24, 10**7, 32, 16
SEED_RULE = "must not be negative, and below 2**32"


@dataclass(frozen=True)
class Data:
    source: Source = named(SOURCES)
    codec: Codec = named(CODECS)


@dataclass(frozen=True)
class ObjectiveSettings:
    label_drop: float
    terms: Mapping[str, Term] = each_named(TERMS)
    # Decay of the average that is the teacher of terms; None: the first.
    teacher_decay: float | None = unset(0.0, None)
    groups: GroupSettings = GroupSettings()

    def __post_init__(self):
        require(0 <= self.label_drop <= 1, "label_drop", self.label_drop, "must lie in [0, 1]")
        require(bool(self.terms), "terms", {}, f"needs at least one of {', '.join(TERMS)}")


@dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis of the mesh; -1 is what the others leave."""

    data: int
    fsdp: int
    tensor: int

    def __post_init__(self):
        for name, size in self._sizes.items():
            require(size >= 1 or size == -1, name, size, "must be at least 1, or -1 for the rest")
        if list(self._sizes.values()).count(-1) > 1:
            raise ConfigError(f"{self._described}: only one of them may be -1 (the rest)")

    @property
    def _sizes(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    @property
    def _described(self) -> str:
        return ", ".join(f"{name} = {size}" for name, size in self._sizes.items())

    def shape(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) for so many devices.

        Raises:
          ConfigError: they do not come out even.
        """
        fixed = math.prod(size for size in self._sizes.values() if size != -1)
        sizes = tuple(devices // fixed if size == -1 else size for size in self._sizes.values())
        if math.prod(sizes) != devices:
            raise ConfigError(
                f"mesh: {self._described} cannot be made of {devices} devices; their product must "
                f"be {devices} (-1 is what the others leave)"
            )
        return sizes


@dataclass(frozen=True)
class Train:
    steps: int | None = unset(0)
    images: int | None = unset(0, most=10**15)
    epochs: float | None = unset(0.0)
    batch_size: int = at_most(LARGEST_BATCH)
    accumulation: int
    steps_per_dispatch: int
    ema_decays: tuple[float, ...]
    spike_factor: float
    only: str | None = unset("", None)
    ema_warmup_power: float = 0.0
    ema_sigma_rel: tuple[float, ...] = ()

    def __post_init__(self):
        rule = "must lie in [0, 1]; 0 is no warm-up, 2/3 is usual"
        power = self.ema_warmup_power
        require(0 <= power <= 1, "ema_warmup_power", power, rule)
        rule = f"must be {', '.join(PARTS)}, or None to train everything"
        require(self.only is None or self.only in PARTS, "only", self.only, rule)
        for name in ("batch_size", "accumulation", "steps_per_dispatch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        factor = self.spike_factor
        rule = "must be above 1, or 0 to skip no update; 10 is careful"
        require(factor == 0 or factor > 1, "spike_factor", factor, rule)
        lengths = [n for n in (self.steps, self.images, self.epochs) if n is not None]
        if len(lengths) != 1 or lengths[0] <= 0:
            raise ConfigError(
                f"steps, images, epochs = {self.steps}, {self.images}, {self.epochs}: give exactly "
                "one of them, above 0, and set the others to None (0 on the command line)"
            )
        for decay in self.ema_decays:
            require(below_one(decay), "ema_decays", self.ema_decays, f"each {BELOW_ONE}")
        require(
            len(set(self.ema_decays)) == len(self.ema_decays) in range(1, MOST_AVERAGES + 1),
            "ema_decays",
            self.ema_decays,
            f"needs at least one decay, not above {MOST_AVERAGES}, each once; the first samples",
        )

        rule = (
            f"needs two lengths or more, each once and in [{power_ema.SHORTEST}, "
            f"{power_ema.LONGEST}], or none; 0.05 and 0.1 are usual"
        )
        lengths = {ema.name_of_length(length) for length in self.ema_sigma_rel}
        fit = all(ema.length(name) is not None for name in lengths)
        number = len(self.ema_sigma_rel)
        known = fit and number == len(lengths) in (0, *range(2, MOST_AVERAGES + 1))
        require(known, "ema_sigma_rel", self.ema_sigma_rel, rule)

    @property
    def averages(self) -> tuple[str, ...]:
        """Names of all averages, the one that is sampled first."""
        return tuple(ema.in_config(vars(self)))

    def has_average(self, name: str) -> bool:
        """Returns whether weights of this name can be had: an average, or a length to compose."""
        by_length = bool(self.ema_sigma_rel) and ema.length(name) is not None
        return name in self.averages or by_length

    def steps_per_epoch(self, dataset_size: int) -> int:
        """Whole batches in the data set, at least 1: an epoch of schedules of loss weights."""
        return max(1, dataset_size // self.batch_size)

    def total_steps(self, dataset_size: int) -> int:
        """Length of the run in optimizer steps, rounded up.

        Raises:
          ConfigError: more than there are numbers for.
        """
        if self.steps is not None:
            return self.steps
        name, images = self.length_in_images(dataset_size)
        steps = max(1, -int(-images // self.batch_size))
        if steps > WHOLE:
            rule = f"make {steps:.3g} steps, must not make more than {WHOLE}"
            raise ConfigError(f"train.{name} = {getattr(self, name)}: {rule}")
        return steps

    def length_in_images(self, dataset_size: int) -> tuple[str, float]:
        """The field that gives the length of a run without `steps`, and that length in images."""
        if self.images is not None:
            return "images", self.images
        return "epochs", self.epochs * dataset_size


@dataclass(frozen=True)
class CheckpointSettings:
    every_steps: int
    keep_last: int
    keep_every_steps: int
    averages_every_steps: int = 0

    def __post_init__(self):
        every, rule = self.averages_every_steps, "must not be negative (0 stores none)"
        require(every >= 0, "averages_every_steps", every, rule)
        require(self.every_steps >= 1, "every_steps", self.every_steps, "must be at least 1")
        require(self.keep_last >= 1, "keep_last", self.keep_last, "must be at least 1")
        if self.keep_every_steps % self.every_steps or self.keep_every_steps < 0:
            raise ConfigError(
                f"keep_every_steps = {self.keep_every_steps}: must be a multiple of every_steps = "
                f"{self.every_steps}, or 0 to keep none for good"
            )


@dataclass(frozen=True)
class Log:
    every_steps: int
    samples_every_steps: int
    peak_tflops: float | None = unset(0.0)

    def __post_init__(self):
        require(self.every_steps >= 1, "every_steps", self.every_steps, "must be at least 1")
        require(
            self.samples_every_steps >= 0,
            "samples_every_steps",
            self.samples_every_steps,
            "must not be negative (0 draws none)",
        )
        peak, rule = self.peak_tflops, "must be above 0, or None for the published one"
        require(peak is None or peak > 0, "peak_tflops", peak, rule)


@dataclass(frozen=True)
class ProfileSettings:
    start: int
    steps: int

    def __post_init__(self):
        for name in ("start", "steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")


@dataclass(frozen=True)
class Guide:
    """The run whose network autoguidance extrapolates from."""

    workdir: Location | None = unset("")
    step: int | None = unset(0)
    weights: str

    def __post_init__(self):
        rule = "must be above 0, or None for the newest"
        require(self.step is None or self.step > 0, "step", self.step, rule)


def class_numbers(labels: str) -> list[int] | None:
    """The class numbers spelt out in a text such as '0,1,2'; None where it is another."""
    numbers = labels.split(",")
    spelt_out = all(re.fullmatch(r"\s*[0-9]{1,9}\s*", n) for n in numbers)
    return [int(n) for n in numbers] if spelt_out else None


@dataclass(frozen=True)
class Sample:
    num: int = at_most(MOST_SAMPLES)
    batch_size: int = at_most(LARGEST_BATCH)
    seed: int = at_most(SEEDS - 1)
    labels: str = at_most(2**20)  # characters
    weights: str
    time_shift: float
    readout: int | None = unset(0)
    ig: Guidance
    cfg: Guidance
    autoguidance: Guidance
    guide: Guide
    sampler: Sampler = named(SAMPLERS)
    # Configs of older runs lack the rest.
    files: tuple[str, ...] = FILES
    token_groups: SamplingGroups = SamplingGroups()
    null_class: NullClass = AT_EVERY_EVALUATION

    def __post_init__(self):
        require(self.num >= 1, "num", self.num, "must be at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        require(0 <= self.seed < SEEDS, "seed", self.seed, SEED_RULE)
        rule = f"must be one or both of {', '.join(FILES)}, each once"
        known = set(self.files) <= set(FILES) and len(set(self.files)) == len(self.files) > 0
        require(known, "files", self.files, rule)
        require(self.time_shift > 0, "time_shift", self.time_shift, "must be above 0; 1 is none")
        if self.time_shift != 1 and (self.sampler.adaptive or self.sampler.process):
            raise ConfigError(
                f"time_shift = {self.time_shift}: moves the steps of an even grid, but this "
                "sampler has its own; set it to 1"
            )
        if self.autoguidance.scale != 1 and self.guide.workdir is None:
            raise ConfigError(
                f"autoguidance.scale = {self.autoguidance.scale}: needs a worse network; name its "
                "run in guide.workdir, or set the scale to 1 (off)"
            )
        require(
            self.labels in LABEL_MODES or self.class_numbers is not None,
            "labels",
            self.labels,
            f"must be {' or '.join(LABEL_MODES)}, or class numbers such as 0,1,2 (then repeated)",
        )

    @property
    def guidances(self) -> Guidances:
        """Kind -> settings."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def class_numbers(self) -> list[int] | None:
        """The class numbers spelt out in `labels`, or None."""
        return class_numbers(self.labels)


@dataclass(frozen=True)
class EvaluateWhileTraining:
    every_steps: int
    num: int = at_most(MOST_SAMPLES)
    loss_every_steps: int = 0

    def __post_init__(self):
        rule = "must not be negative (0: only by --mode=evaluate)"
        require(self.every_steps >= 0, "every_steps", self.every_steps, rule)
        rule = "must not be negative (0 computes none)"
        require(self.loss_every_steps >= 0, "loss_every_steps", self.loss_every_steps, rule)
        require(self.num >= 10, "num", self.num, ENOUGH)


@dataclass(frozen=True)
class Evaluate:
    num: int = at_most(MOST_SAMPLES)
    seeds: tuple[int, ...] = at_most(SEEDS - 1)
    # Configs of older runs lack the rest.
    reference: Location | None = unset("", None)
    samples: Location | None = unset("", None)
    while_training: EvaluateWhileTraining = EvaluateWhileTraining(0, 10_000)
    features: FeatureSpace = named(FEATURES, Inception(None))
    second_features: FeatureSpace | None = optionally_named(FEATURES)
    second_reference: Location | None = unset("", None)

    def __post_init__(self):
        if self.second_features is not None:
            first, second = self.features.frechet, self.second_features.frechet
            rule = f"its distance must not be called {first} too, as that of evaluate.features is"
            require(first != second, "second_features", type(self.second_features).__name__, rule)
        require(self.num >= 10, "num", self.num, ENOUGH)
        require(bool(self.seeds), "seeds", self.seeds, "needs at least one")
        require(all(0 <= s < SEEDS for s in self.seeds), "seeds", self.seeds, f"each {SEED_RULE}")


@dataclass(frozen=True)
class SearchSettings:
    metric: str
    num: int = at_most(MOST_SAMPLES)
    rounds: int = at_most(16)  # the last candidates take 2**(rounds - 1) seeds
    keep: float
    first_seed: int = at_most(SEEDS - 1)
    space: Space

    def __post_init__(self):
        require(self.num >= 10, "num", self.num, ENOUGH)
        require(self.rounds >= 1, "rounds", self.rounds, "must be at least 1")
        require(0 < self.keep <= 1, "keep", self.keep, "must lie in (0, 1]; a half is usual")
        require(0 <= self.first_seed < SEEDS, "first_seed", self.first_seed, SEED_RULE)


@dataclass(frozen=True)
class Visualize:
    """Settings of --mode=visualize, which draws tokens."""

    images: Location | None = unset("")
    num: int = at_most(64)  # all are computed on, and drawn, together
    resize: str
    blocks: tuple[int, ...]
    times: tuple[float, ...]
    labels: str | None = unset("")
    seed: int = at_most(SEEDS - 1)
    norm: str
    basis: str

    def __post_init__(self):
        require(self.num >= 1, "num", self.num, "must be at least 1")
        require(0 <= self.seed < SEEDS, "seed", self.seed, SEED_RULE)
        for name, known in (("resize", RESIZES), ("norm", TOKEN_NORMS), ("basis", BASES)):
            value = getattr(self, name)
            require(value in known, name, value, f"must be {' or '.join(known)}")
        rule = "must be numbers of blocks from 1, each once; () for up to seven"
        different = len(set(self.blocks)) == len(self.blocks)
        known = different and all(block >= 1 for block in self.blocks)
        require(known, "blocks", self.blocks, rule)
        rule = f"needs 1 to {MOST_TIMES} times in [0, 1]; 0 is data, 1 is noise"
        known = 1 <= len(self.times) <= MOST_TIMES and all(0 <= t <= 1 for t in self.times)
        require(known, "times", self.times, rule)
        rule = "must be class numbers such as 0,1,2 (then repeated), or None for the null class"
        known = self.labels is None or class_numbers(self.labels) is not None
        require(known, "labels", self.labels, rule)


@dataclass(frozen=True)
class Prepare:
    """Settings of --mode=prepare, which writes latents."""

    layout: str
    batch_size: int = at_most(LARGEST_BATCH)
    examples_per_file: int
    bad_examples: str

    def __post_init__(self):
        known = ", ".join(LAYOUTS)
        require(self.layout in LAYOUTS, "layout", self.layout, f"must be one of {known}")
        for name in ("batch_size", "examples_per_file"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(
            self.bad_examples in ("stop", "skip"),
            "bad_examples",
            self.bad_examples,
            "must be stop (at the first that cannot be read) or skip (and list them)",
        )
