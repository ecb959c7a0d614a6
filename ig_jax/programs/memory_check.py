"""Lower bound on the host memory of a run, checked before it starts.

Counted is only what must be there at one time: parameters, optimizer and averages, and the tokens
of one batch. What this lets pass may still be too large; what it refuses certainly is.
"""

from __future__ import annotations

import math
import os

import jax
import numpy as np

from ig_jax import pytree
from ig_jax.experiment import Experiment
from ig_jax.parallel.mesh import bytes_each, parts_of_batch

_UPDATES = ("train", "demo", "replay", "study", "select")  # modes that hold the state of training
_SAMPLES = ("sample", "evaluate", "search", "demo")


def of_host() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def of_device() -> int:
    """Bytes that each device of this process has; those of a CPU share the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or of_host() // jax.local_device_count()


def shortage(exp: Experiment, mode: str) -> str:
    """Returns why `mode` cannot run here, in a sentence with a way out; '' where it may fit.

    Args:
      exp: a run on the devices of this machine.
      mode: of `run.MODES`.
    """
    shortages = []
    if mode in _UPDATES:
        shortages += [_of_state(exp), _of_batch(exp), _of_rows(exp)]
    of_files = mode == "evaluate" and exp.config.evaluate.samples  # no network is needed for those
    if mode in _SAMPLES and not of_files:
        shortages += [_of_weights(exp), _of_samples(exp)]
    if mode in ("visualize", "probe", "ema"):
        shortages.append(_of_weights(exp))
    if mode == "probe":
        shortages += [_of_probes(exp), _of_probed(exp)]
    if mode == "prepare":
        batch = exp.config.prepare.batch_size * _stored_bytes(exp)
        shortages.append(
            _short("prepare.batch_size", exp.config.prepare.batch_size, batch, of_host())
        )
    return next(filter(None, shortages), "")


def size_text(count: int) -> str:
    """'24 GB', of the largest unit that leaves a number of at least 1."""
    units = {"EB": 1e18, "PB": 1e15, "TB": 1e12, "GB": 1e9}
    name, size = next(((n, s) for n, s in units.items() if count >= s), ("MB", 1e6))
    return f"{count / size:,.3g} {name}"


def _short(field: str, value: int, needed: int, there: int, fix: str = "lower it") -> str:
    if needed <= there:
        return ""
    return (
        f"{field} = {value}: takes at least {size_text(needed)} at a time, but this machine has "
        f"{size_text(there)} for it; {fix}"
    )


def _too_large(exp: Experiment, needed: int, what: str, fix: str) -> str:
    there = of_device()
    if needed <= there:
        return ""
    count = pytree.count(exp.abstract_params)
    return (
        f"model: {count:,} parameters take {size_text(needed)} {what} on each device, but there "
        f"are {size_text(there)}; lower model.hidden_size or model.depth{fix}"
    )


def _of_state(exp: Experiment) -> str:
    needed = bytes_each(exp.abstract_state)
    fix = ", or take more devices"
    return _too_large(exp, needed, "with their optimizer and averages", fix)


def _of_weights(exp: Experiment) -> str:
    return _too_large(exp, pytree.num_bytes(exp.abstract_params), "to sample from", "")


def _token_bytes(exp: Experiment) -> int:
    """Of one image between two blocks, float32."""
    s = exp.config.model
    return s.num_tokens(exp.net.side) * s.hidden_size * 4


def _of_batch(exp: Experiment) -> str:
    c = exp.config.train
    parts = parts_of_batch(exp.mesh) * c.accumulation
    # However little is kept for the backward pass, what enters each block is.
    needed = c.batch_size // parts * exp.config.model.depth * _token_bytes(exp)
    fix = "lower it, or raise train.accumulation"
    return _short("train.batch_size", c.batch_size, needed, of_device(), fix)


def _of_rows(exp: Experiment) -> str:
    """Bytes that the host gathers for one call of the compiled program."""
    c = exp.config.train
    rows = c.batch_size // jax.process_count() * c.steps_per_dispatch
    needed = rows * _stored_bytes(exp)
    fix = "lower it, or train.batch_size"
    return _short("train.steps_per_dispatch", c.steps_per_dispatch, needed, of_host(), fix)


def _of_samples(exp: Experiment) -> str:
    s = exp.config.sample
    needed = s.batch_size // exp.mesh.size * _token_bytes(exp)
    return _short("sample.batch_size", s.batch_size, needed, of_device())


def _of_probes(exp: Experiment) -> str:
    """The classifiers with Adam's two averages, whole on each device."""
    p, classes = exp.config.probe, exp.num_classes
    cells = len(p.times) * (len(p.blocks) or exp.config.model.depth)
    needed = 3 * 4 * cells * exp.config.model.hidden_size * classes
    return _short(
        "cells of probe.times x probe.blocks", cells, needed, of_device(), "name fewer of them"
    )


def _of_probed(exp: Experiment) -> str:
    needed = exp.config.probe.batch_size // exp.local_mesh.size * _token_bytes(exp)
    return _short("probe.batch_size", exp.config.probe.batch_size, needed, of_device())


def _stored_bytes(exp: Experiment) -> int:
    source = exp.config.data.source
    return math.prod(source.stored_shape) * np.dtype(source.stored_dtype).itemsize
