"""A study of the tiny run: three methods, two of which share their runs, under two seeds."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import tiny
from ml_collections import ConfigDict

from ig_jax import experiment as build
from ig_jax.config import run_config
from ig_jax.experiment import Experiment
from ig_jax.study import methods
from ig_jax.study.cells import Cells
from ig_jax.study.measures import Bench

SRA2 = {"objective": {"terms": {"sra2": {"weight": 1.0, "depth": 1}}}}
EARLY = {"sample": {"autoguidance": {"scale": 2.5}, "guide": {"step": 4}}}
METHODS = {
    "plain": {},
    "sra2": {"overrides": SRA2},
    "guided": {"same_run_as": "plain", "guide": "sra2", "overrides": EARLY},
}
SMALL = {
    **{
        "train.steps": 8,
        "log.every_steps": 4,
        "checkpoint.every_steps": 4,
        "sample.ig.scale": 1.0,
        "sample.cfg.scale": 1.0,
    },
    **{"sample.sampler.num_steps": 2, "checkpoint.keep_every_steps": 4},
}


def settings(changes: Mapping[str, Any] = MappingProxyType({}), **study: Any) -> ConfigDict:
    """The tiny config with the study; `study` replaces fields of its section."""
    section = {
        "methods": METHODS,
        "seeds": (3, 1),
        "baseline": "plain",
        "measures": ("loss",),
        "probe": {"blocks": (), "time": 0.1},
    }
    return tiny.settings({**SMALL, **changes, "study": {**section, **study}})


def experiment(c: ConfigDict) -> Experiment:
    """On one device, for which programs compile soonest."""
    return build.experiment(run_config.parse(c, 1), jax.devices()[:1])


def cells(folder: Path, **study: Any) -> Cells:
    exp = experiment(settings(**study))
    s = exp.config.study
    return Cells(folder, methods.rows(exp, s, folder), s.seeds, Bench(exp, s.measures, s.probe))
