"""The ways of sampling that a table compares: plain, each guidance alone, IG with CFG."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ig_jax import guidance
from ig_jax.generation.batches import sample_batches
from ig_jax.generation.generator import Generator
from ig_jax.guidance import Guidance, Guidances
from ig_jax.parallel.processes import allgather_rows, process_slice
from ig_jax.types import Params


def variants(settings: Guidances, *, readout: bool = False) -> dict[str, Guidances]:
    """Name -> guidances: none, each kind that is on by itself, IG with CFG.

    Names join the kinds by '_': plain, ig, cfg, autoguidance, ig_cfg. With `readout` the first is
    'readout': the early head alone, which is IG at scale 0.
    """
    on = {kind for kind, g in settings.items() if g.scale != 1}
    wanted = [(), ("ig",), ("cfg",), ("autoguidance",), ("ig", "cfg")]
    guided = {
        "_".join(kinds) or "plain": guidance.only(settings, kinds)
        for kinds in wanted
        if on >= set(kinds)
    }
    alone = {"readout": guidance.only(settings, ()) | {"ig": Guidance(0.0, 0.0, 1.0)}}
    return (alone if readout and "ig" in on else {}) | guided


def draw_samples(
    generator: Generator, params: Params, num: int, seed: int, bar: Any, **chosen: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(decoded samples, labels) of the first `num` samples under `seed`.

    `chosen` may name guidances, a sampler and a readout, as for `Generator`.
    """
    own, parts = np.array(process_slice(num)), []
    for part in sample_batches(generator, params, seed, own, **chosen):
        parts.append(part)
        bar.update(len(part.indices) * jax.process_count())
    images, labels = (np.concatenate([p[i] for p in parts]) for i in (1, 2))
    return allgather_rows(images, num), allgather_rows(labels, num)
