"""Sampling: noise to pictures in one compiled call a batch; files that can be finished later.

Sample i depends on (seed, i) alone: on no batch size, number of devices, or order (but for
rounding, which an adaptive sampler may amplify up to its tolerances). Files that exist
are not made again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax import (
    checkpoint,
    compatible,
    drawing,
    flops,
    guide,
    lock,
    logs,
    prng,
    sharding,
    storage,
)
from ig_jax.build import Experiment
from ig_jax.config import Config
from ig_jax.drawing import Generator
from ig_jax.errors import UserError
from ig_jax.formats import files
from ig_jax.guidance import KINDS
from ig_jax.sample_files import SETTINGS, SampleFiles
from ig_jax.samplers.base import Sampler
from ig_jax.types import Params


def labels_of(config: Config, seed: int, indices: np.ndarray) -> np.ndarray:
    """Labels int32 [b] of samples `indices`, as `sample.labels` asks.

    Random: each sample's own draw. Balanced: every run of num_classes samples holds each class
    once, in shuffled order (metrics over consecutive splits need the shuffle). Given: repeated in
    order.
    """
    classes = config.data.source.num_classes
    given = config.sample.given_labels
    if given is not None:
        return np.array(given, np.int32)[indices % len(given)]
    if config.sample.labels == "random":
        keys = prng.sample_keys(seed, jnp.asarray(indices))
        return np.asarray(prng.sample_labels(keys, classes), np.int32)
    rounds = {r: np.random.default_rng((seed, r)).permutation(classes) for r in indices // classes}
    return np.array([rounds[i // classes][i % classes] for i in indices], np.int32)


class Drawn(NamedTuple):
    """A batch of samples on the host."""

    indices: np.ndarray
    images: np.ndarray  # decoded
    labels: np.ndarray


def batches(
    generator: Generator, params: Params, seed: int, indices: np.ndarray, **chosen: Any
) -> Iterator[Drawn]:
    """Samples `indices`, a batch at a time; the last one is padded, then cut.

    The next batch is begun before one is handed out: while the host writes files, devices work.
    `chosen` may name guidances and a sampler, as for `Generator`.

    Raises:
      UserError: a sample is not finite.
    """
    exp = generator.exp
    size = exp.samples_here
    labels = labels_of(exp.config, seed, indices)

    def begun() -> Iterator[tuple[np.ndarray, tuple[jax.Array, jax.Array]]]:
        for start in range(0, len(indices), size):
            taken = np.arange(start, min(start + size, len(indices)))
            padded = np.resize(taken, size)
            host = {"i": indices[padded].astype(np.int32), "y": labels[padded]}
            rows = sharding.to_global(host, exp.own_mesh, size)
            yield taken, generator(params, np.uint32(seed), rows["i"], rows["y"], **chosen)

    for taken, drawn in sharding.one_ahead(begun()):
        images, finite = (sharding.to_host(x)[: len(taken)] for x in drawn)
        sampler = chosen.get("sampler") or exp.config.sample.sampler
        _require_finite(indices[taken][~finite], sampler)
        yield Drawn(indices[taken], images, labels[taken])


def _require_finite(failed: np.ndarray, sampler: Sampler) -> None:
    """Raises UserError if there are any indices [n] of samples that are not numbers."""
    if not len(failed):
        return
    mend = "lower the guidance scales, or look whether training went well"
    if sampler.adaptive:
        mend = (
            f"{type(sampler).__name__} may need more than sample.sampler.num_steps = "
            f"{sampler.num_steps} steps at rtol = {sampler.rtol:g}; raise either"
        )
    raise UserError(f"sample {failed[0]} and {len(failed) - 1} others are not finite: {mend}")


def load_weights(exp: Experiment, workdir: Path) -> tuple[int, Params]:
    """(step, weights) of the newest checkpoint, as `sample.weights` asks.

    Raises:
      UserError: there is no checkpoint, or it was made with another model.
    """
    checkpoints = checkpoint.of_run(workdir, "--workdir")

    def read(step: int) -> Params:
        checkpoints.require(step, exp.config.raw, compatible.SAMPLES)
        return checkpoints.weights(step, exp.config.sample.weights, exp.weights_here)

    try:
        step, found = checkpoints.newest(read, checkpoint.WEIGHTS)
        return step, sharding.whole_on(exp.mesh, found)
    finally:
        checkpoints.close()


def settings(exp: Experiment, step: int) -> dict[str, Any]:
    """All that decides what sample i looks like, for the record and for the folder's name."""
    s = exp.config.raw["sample"]
    decisive = ("seed", "labels", "weights", "sampler", "time_shift", "readout", *KINDS)
    model = {name: exp.config.raw[name] for name in ("model", "process")}
    rest = {"guide": guide.record(exp), "codec": exp.config.raw["data"]["codec"]}
    return {"checkpoint_step": step, **{name: s[name] for name in decisive}, **rest, **model}


def folder(parent: Path, record: Mapping[str, Any]) -> Path:
    """A folder in `parent` whose name tells the main settings, and differs whenever any differs."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    if "sampler" not in record:  # samples of other programs
        return parent / f"files-{digest}"
    sampler = record["sampler"]
    name = (
        f"step{record['checkpoint_step']}-{record['weights']}-{sampler['name']}"
        f"{sampler['num_steps']}-ig{record['ig']['scale']:g}-cfg{record['cfg']['scale']:g}"
    )
    seed = f"-seed{record['seed']}" if "seed" in record else ""
    return parent / f"{name}{seed}-{digest}"


def run(exp: Experiment, workdir: Path) -> Path:
    """Draws `sample.num` pictures from the newest checkpoint of `workdir`; returns their folder.

    Raises:
      UserError: there is no checkpoint; a sample is not finite; another program draws the same
        samples; the disk is full or gone.
    """
    with storage.errors_told(workdir):
        step, params = load_weights(exp, workdir)
        record = settings(exp, step)
        target = folder(workdir / "samples", record)
        with lock.held(target), storage.errors_told(target):
            _draw(exp, params, target, record)
    return target


def _draw(exp: Experiment, params: Params, target: Path, record: dict[str, Any]) -> None:
    """Draws into the folder `target` what is missing there."""
    s = exp.config.sample
    generator = Generator(exp, guide.load(exp))
    kept = SampleFiles(target, s.num, generator.shape, s.files)
    of_image = drawing.cost(generator)
    if jax.process_index() == 0:
        kept.create()
        files.write_json(target / SETTINGS, record | {"an_image": of_image})
    sharding.meet("begun")
    mine = np.array(sharding.mine(s.num))
    missing = kept.missing(mine)
    # The bar is of this process, whose share takes as long as everybody's.
    done = len(mine) - len(missing)
    with logs.progress(len(mine), initial=done, unit="image", what="sampling") as bar:
        for indices, images, _ in batches(generator, params, s.seed, missing):
            kept.write(indices, images)
            bar.update(len(indices))
    sharding.meet("sampled")
    if jax.process_index() == 0:
        made = kept.finish(labels_of(exp.config, s.seed, np.arange(s.num)))
        step = record["checkpoint_step"]
        logs.say(f"{s.num:,} samples of step {step} are in {target} ({', '.join(made)})")
        if of_image is not None:
            logs.say(
                f"each took {of_image['evaluations']} evaluations of the network, "
                f"{flops.in_words(of_image['flops'])}"
            )
