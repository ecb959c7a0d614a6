"""Sampling: noise to pictures in one compiled call a batch; files that can be finished later.

Sample i depends on (seed, i) alone: on no batch size, number of devices, or order. Files that exist
are not made again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax import checkpoint, guidance, logs, pictures, prng, sharding
from ig_jax.build import Experiment
from ig_jax.checkpoint import Checkpoints
from ig_jax.config import Config
from ig_jax.errors import UserError
from ig_jax.guidance import Guidance
from ig_jax.samplers import base
from ig_jax.types import Images, Labels, Latents, Params

Generate = Callable[[Params, jax.Array, jax.Array, jax.Array], Images]


def trajectory(
    exp: Experiment, params: Params, seed: jax.Array, indices: jax.Array, y: Labels, ig, cfg
) -> Latents:
    """Latents [b, h, w, c] of samples `indices` [b] under seed, labels y [b] and two guidances."""
    sampler, shape = exp.config.sample.sampler, exp.net.latent_shape
    keys = prng.sample_keys(seed, indices)
    fields = guidance.fields(
        guidance.stretches(sampler.grid(), ig, cfg),
        exp.net,
        params,
        y,
        process=exp.config.process,
        null_class=exp.num_classes,
        readout=exp.config.readout,
        ig=ig,
        cfg=cfg,
    )
    return base.sample(
        sampler,
        fields,
        prng.sample_normal(keys, shape, prng.LATENTS),
        lambda i: prng.sample_normal(keys, shape, prng.FIRST_STEP + i),
    )


def make_generate(exp: Experiment, ig: Guidance, cfg: Guidance) -> Generate:
    """The compiled program (params, seed, indices [b], labels [b]) -> uint8 images [b, H, W, c]."""

    def generate(params: Params, seed: jax.Array, indices: jax.Array, y: Labels) -> Images:
        latents = trajectory(exp, params, seed, indices, y, ig, cfg)
        return exp.config.data.codec.decode(latents)

    whole, rows = sharding.replicated(exp.mesh), sharding.over_batch(exp.mesh)
    return jax.jit(generate, in_shardings=(whole, whole, rows, rows), out_shardings=rows)


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


def batches(
    exp: Experiment, generate: Generate, params: Params, seed: int, indices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(indices, images, labels), a batch at a time; the last one is padded, then cut."""
    size = exp.config.sample.batch_size
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        padded = np.resize(chosen, size)
        labels = labels_of(exp.config, seed, padded)
        rows = sharding.to_global({"i": padded.astype(np.int32), "y": labels}, exp.mesh)
        images = sharding.to_host(generate(params, np.uint32(seed), rows["i"], rows["y"]))
        yield chosen, images[: len(chosen)], labels[: len(chosen)]


def load_weights(exp: Experiment, workdir: Path) -> tuple[int, Params]:
    """(step, weights) of the newest checkpoint, as `sample.weights` asks.

    Raises:
      UserError: there is no checkpoint, or it was made with another model.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"{workdir} holds no checkpoint: train first (--mode=train), or name a run's --workdir"
        )
    checkpoints = Checkpoints(workdir)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"{workdir} holds no finished checkpoint: train on (--mode=train)")
        checkpoints.require(step, exp.config.raw, checkpoint.SAMPLES)
        placed = sharding.replicated(exp.mesh)
        which = exp.config.sample.weights
        return step, checkpoints.weights(step, which, exp.abstract_params, placed)
    finally:
        checkpoints.close()


def settings(exp: Experiment, step: int) -> dict[str, Any]:
    """All that decides what sample i looks like, for the record and for the folder's name."""
    s = exp.config.raw["sample"]
    decisive = ("seed", "labels", "weights", "sampler", "readout", "ig", "cfg")
    model = {name: exp.config.raw[name] for name in ("model", "process")}
    return {"checkpoint_step": step, **{name: s[name] for name in decisive}, **model}


def folder(workdir: Path, record: dict[str, Any]) -> Path:
    """A folder whose name tells the main settings and differs whenever any setting does."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    sampler = record["sampler"]
    name = (
        f"step{record['checkpoint_step']}-{record['weights']}-{sampler['name']}"
        f"{sampler['num_steps']}-ig{record['ig']['scale']:g}-cfg{record['cfg']['scale']:g}"
        f"-seed{record['seed']}-{digest}"
    )
    return workdir / "samples" / name


def _file(target: Path, index: int) -> Path:
    return target / f"{index:06d}.png"


def _collect(exp: Experiment, target: Path, num: int) -> None:
    """Makes samples.npz (arr_0: uint8 [n, H, W, c], arr_1: labels) and grid.png from the files."""
    channels = _picture_channels(exp)
    images = np.stack([pictures.load(_file(target, i), channels) for i in range(num)])
    labels = labels_of(exp.config, exp.config.sample.seed, np.arange(num))
    temporary = target / ".samples.npz.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, arr_0=images, arr_1=labels)
    temporary.replace(target / "samples.npz")
    shown = min(num, 100)
    columns = min(10, shown)
    pictures.save(
        target / "grid.png", pictures.grid(images[:shown], columns, labels[:shown].tolist())
    )


def _picture_channels(exp: Experiment) -> int:
    """Channels of the pictures that the codec decodes to."""
    latents = jax.ShapeDtypeStruct((1, *exp.net.latent_shape), jnp.float32)
    return jax.eval_shape(exp.config.data.codec.decode, latents).shape[-1]


def run(exp: Experiment, workdir: Path) -> Path:
    """Draws `sample.num` pictures from the newest checkpoint of `workdir`; returns their folder."""
    step, params = load_weights(exp, workdir)
    s = exp.config.sample
    record = settings(exp, step)
    target = folder(workdir, record)
    target.mkdir(parents=True, exist_ok=True)
    logs.write_json(target / "settings.json", record)
    missing = np.array([i for i in range(s.num) if not _file(target, i).exists()], int)
    generate = make_generate(exp, s.ig, s.cfg)
    done = s.num - len(missing)
    with logs.progress(s.num, initial=done, unit="image", what="sampling") as bar:
        for indices, images, _ in batches(exp, generate, params, s.seed, missing):
            for index, image in zip(indices.tolist(), images, strict=True):
                pictures.save(_file(target, index), image)
            bar.update(len(indices))
    _collect(exp, target, s.num)
    logs.say(f"{s.num} samples of step {step} are in {target} (PNG, grid.png, samples.npz)")
    return target
