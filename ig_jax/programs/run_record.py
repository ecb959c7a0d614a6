"""Weights, settings and result folders of a run, for the programs that sample from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ig_jax.checkpoint import compatibility
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.experiment import Experiment
from ig_jax.guidance import AT_EVERY_EVALUATION, KINDS
from ig_jax.parallel.mesh import replicate_locally
from ig_jax.programs import guide_model
from ig_jax.types import Params


def load_weights(exp: Experiment, workdir: Path) -> tuple[int, Params]:
    """(step, weights) of the newest checkpoint, as `sample.weights` asks.

    Raises:
      UserError: there is no checkpoint, or it was made with another model.
    """
    with closing(checkpoint_manager.of_run(workdir, "--workdir")) as checkpoints:

        def read(step: int) -> Params:
            checkpoints.require(step, exp.config.raw, compatibility.SAMPLES)
            return checkpoints.weights(step, exp.config.sample.weights, exp.replicated_params)

        step, params = checkpoints.newest(read, checkpoint_manager.WEIGHTS)
        return step, replicate_locally(exp.mesh, params)


def weights_at(exp: Experiment, workdir: Path, step: int, which: str) -> Params:
    """Weights `which` (see `Checkpoints.weights`) of a step that `load_weights` gave.

    Raises:
      UserError: they are not there any more.
    """
    with closing(checkpoint_manager.of_run(workdir, "--workdir")) as checkpoints:
        params = checkpoints.weights(step, which, exp.replicated_params)
        return replicate_locally(exp.mesh, params)


def settings(exp: Experiment, step: int) -> dict[str, Any]:
    """All that decides what sample i looks like, for the record and for the folder's name."""
    s = exp.config.raw["sample"]
    decisive = ("seed", "labels", "weights", "sampler", "time_shift", "readout", *KINDS)
    model = {name: exp.config.raw[name] for name in ("model", "process")}
    guide = guide_model.record(exp.config.sample)
    rest = {"guide": guide, "codec": exp.config.raw["data"]["codec"]}
    if exp.config.sample.token_groups.share:  # records of older versions lack it
        rest["token_groups"] = s["token_groups"]
    if exp.config.sample.null_class != AT_EVERY_EVALUATION:  # likewise
        rest["null_class"] = s["null_class"]
    return {"checkpoint_step": step, **{name: s[name] for name in decisive}, **rest, **model}


def settings_digest(record: Mapping[str, Any]) -> str:
    """Eight characters of a record, for the name of a folder."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]


def folder(parent: Path, record: Mapping[str, Any]) -> Path:
    """A folder in `parent` whose name holds the main settings, and differs whenever any differs."""
    if "sampler" not in record:  # samples of other programs
        return parent / f"files-{settings_digest(record)}"
    sampler = record["sampler"]
    name = (
        f"step{record['checkpoint_step']}-{record['weights']}-{sampler['name']}"
        f"{sampler['num_steps']}-ig{record['ig']['scale']:g}-cfg{record['cfg']['scale']:g}"
    )
    seed = f"-seed{record['seed']}" if "seed" in record else ""
    return parent / f"{name}{seed}-{settings_digest(record)}"
