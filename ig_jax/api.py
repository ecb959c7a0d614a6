"""The Python API: what `import ig_jax` offers to notebooks and other programs."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ig_jax.codecs.autoencoders import Autoencoder
from ig_jax.config import probe as probe_settings
from ig_jax.config.parser import make
from ig_jax.data import SOURCES
from ig_jax.errors import UserError
from ig_jax.evaluation import probing
from ig_jax.evaluation.probing import ProbeResult
from ig_jax.experiment import open_run
from ig_jax.io import paths
from ig_jax.metrics import FEATURES
from ig_jax.objectives import TERMS
from ig_jax.pipeline import Pipeline
from ig_jax.plots.token_pca import token_pca as token_pca
from ig_jax.programs.import_checkpoint import open_published
from ig_jax.samplers import SAMPLERS
from ig_jax.types import Source


def load(
    path: str | os.PathLike[str],
    *,
    weights: str = "ema",
    step: int | None = None,
    codec_weights: str | os.PathLike[str] | None = None,
    **published: Any,
) -> Pipeline:
    """Opens a trained network; its data set is not needed.

    Args:
      path: a workdir with checkpoints, or a published file (.pt, .safetensors).
      weights: of a workdir: `ema` (the average of the first decay), `raw`, a decay such as
        `0.9999`, or a length that --mode=ema composed, such as `sigma_rel_0.08`.
      step: of a workdir: the checkpoint; the newest that is whole by default.
      codec_weights: the autoencoder's published file, where the run has one and it lies elsewhere.
      published: of a file: what it does not say by itself, as the flags of --mode=import:
        readout_depth, family, num_heads, num_classes, time_direction, path, prediction, part.

    Raises:
      UserError: there is no such run or file, or it is damaged, or more must be declared; in one
        sentence.
    """
    place = Path(paths.given(path, "path"))
    if place.is_dir():
        if published:
            raise UserError(f"{sorted(published)[0]}: is for published files, but {place} is a run")
        pipeline = open_run(place, weights, step, "path")
    else:
        if weights != "ema" or step is not None:
            raise UserError(f"{place}: weights and step are of runs; name a file's part by part=")
        pipeline = _of_file(place, published)
    if codec_weights is None:
        return pipeline
    if not isinstance(pipeline.codec, Autoencoder):
        raise UserError(f"codec_weights: the codec of {place} has no weights; leave it out")
    file = paths.given(codec_weights, "codec_weights")
    return replace(pipeline, codec=replace(pipeline.codec, weights=file))


def _of_file(file: Path, published: dict[str, Any]) -> Pipeline:
    # Only here: the recipes of the published models are a package beside this one.
    from configs.published import bases

    return open_published(file, bases(), **published)


def probe(
    pipeline: Pipeline, train: Source, test: Source | None = None, **settings: Any
) -> ProbeResult:
    """Linear classifiers on the network's features, of every block at every noise level.

    Args:
      pipeline: from `load`.
      train: a data source of images or latents with labels, as the pipeline's codec reads them.
      test: another; by default what `train` holds out, if anything.
      settings: of the section `probe` of configs/base.py, where they differ from those there.

    Raises:
      UserError: a setting is unknown or out of range; the data have no classes, or are too few.
    """
    values = vars(probe_settings.DEFAULTS) | settings
    known = make(probe_settings.Probe, values, "probe")
    return probing.probe(pipeline, train, train.held_out() if test is None else test, known)


def _register(table: dict[str, Any], name: str, value: type, what: str) -> None:
    """Adds a row; what was registered before under the same name is replaced, as in notebooks."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{what} {name!r}: must be a name such as 'my_{what}'")
    known = table.get(name)
    if known is not None and known.__module__.startswith("ig_jax."):
        raise UserError(f"{what} {name!r}: is one of this package's own; choose another name")
    table[name] = value


def register_term(name: str, term: type) -> None:
    """Adds a loss term, an `objectives.base.Term`, under `config.objective.terms.<name>`."""
    _register(TERMS, name, term, "term")


def register_sampler(name: str, sampler: type) -> None:
    """Adds a sampler, a `samplers.base.Sampler`, as `config.sample.sampler.name`."""
    _register(SAMPLERS, name, sampler, "sampler")


def register_source(name: str, source: type) -> None:
    """Adds a data source, a `types.Source`, as `config.data.source.name`."""
    _register(SOURCES, name, source, "source")


def register_feature_space(name: str, space: type) -> None:
    """Adds a feature space, a `metrics.feature_space.FeatureSpace`, as `evaluate.features.name`."""
    _register(FEATURES, name, space, "feature_space")
