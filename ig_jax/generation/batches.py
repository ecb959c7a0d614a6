"""Batches of samples: labels, compiled calls, finite results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ig_jax import prng
from ig_jax.config.schema import Sample
from ig_jax.errors import UserError
from ig_jax.generation.generator import Generator, Output
from ig_jax.parallel.mesh import prefetch, to_global, to_host
from ig_jax.samplers.base import Sampler
from ig_jax.types import Params


def labels_of(sampling: Sample, num_classes: int, seed: int, indices: np.ndarray) -> np.ndarray:
    """Labels int32 [b] of samples `indices`, as `sampling.labels` asks.

    Random: each sample's own draw. Balanced: every run of num_classes samples holds each class
    once, in shuffled order (metrics over consecutive splits need the shuffle). Given: repeated in
    order.
    """
    given = sampling.given_labels
    if given is not None:
        return np.array(given, np.int32)[indices % len(given)]
    if sampling.labels == "random":
        keys = prng.sample_keys(seed, jnp.asarray(indices))
        return np.asarray(prng.sample_labels(keys, num_classes), np.int32)
    rounds = {
        r: np.random.default_rng((seed, r)).permutation(num_classes) for r in indices // num_classes
    }
    return np.array([rounds[i // num_classes][i % num_classes] for i in indices], np.int32)


class SampleBatch(NamedTuple):
    """A batch of samples on the host."""

    indices: np.ndarray
    images: np.ndarray  # decoded
    labels: np.ndarray


def sample_batches(
    generator: Generator, params: Params, seed: int, indices: np.ndarray, **chosen: Any
) -> Iterator[SampleBatch]:
    """Samples `indices`, a batch at a time; the last one is padded, then cut.

    The next batch is begun before one is handed out: while the host writes files, devices work.
    `chosen` may name guidances and a sampler, as for `Generator`.

    Raises:
      UserError: a sample is not finite.
    """
    size, sampling = generator.batch_size, generator.sampling
    labels = labels_of(sampling, generator.num_classes, seed, indices)

    def begun() -> Iterator[tuple[np.ndarray, Output]]:
        for start in range(0, len(indices), size):
            taken = np.arange(start, min(start + size, len(indices)))
            padded = np.resize(taken, size)
            host = {"i": indices[padded].astype(np.int32), "y": labels[padded]}
            rows = to_global(host, generator.mesh, size)
            yield taken, generator(params, np.uint32(seed), rows["i"], rows["y"], **chosen)

    for taken, drawn in prefetch(begun()):
        images, finite = (to_host(x)[: len(taken)] for x in (drawn.decoded, drawn.finite))
        sampler = chosen.get("sampler") or sampling.sampler
        require_finite(indices[taken][~finite], sampler)
        yield SampleBatch(indices[taken], images, labels[taken])


def require_finite(failed: np.ndarray, sampler: Sampler) -> None:
    """Raises UserError if there are any indices [n] of samples that are not numbers."""
    if not len(failed):
        return
    fix = "lower the guidance scales, or look whether training went well"
    if sampler.adaptive:
        fix = (
            f"{type(sampler).__name__} may need more than sample.sampler.num_steps = "
            f"{sampler.num_steps} steps at rtol = {sampler.rtol:g}; raise either"
        )
    raise UserError(f"sample {failed[0]} and {len(failed) - 1} others are not finite: {fix}")
