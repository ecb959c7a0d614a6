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
    numbers = sampling.class_numbers
    if numbers is not None:
        return np.array(numbers, np.int32)[indices % len(numbers)]
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


def outputs(
    generator: Generator,
    params: Params,
    seed: int,
    indices: np.ndarray,
    labels: np.ndarray,
    noise: np.ndarray | None = None,
    *,
    size: int,
    **chosen: Any,
) -> Iterator[tuple[np.ndarray, Output]]:
    """Runs the generator on `size` samples at a time; the last ones are padded, then cut.

    The next batch is begun before one is handed out: while the host uses it, devices work.

    Args:
      generator: on a mesh whose devices divide `size`.
      params: of its network.
      seed: of the samples.
      indices, labels: int [n], which samples and their labels.
      noise: initial noise [n, h, w, c], or None.
      size: samples of one call.
      chosen: as for `Generator`: guidances, sampler, readout, trajectory.

    Yields:
      Places [b] of the batch within `indices`, and its output as numpy arrays [b, ...].

    Raises:
      UserError: a sample is not finite.
    """
    rows = {"indices": indices.astype(np.int32), "y": labels}
    rows |= {} if noise is None else {"noise": noise}

    def begun() -> Iterator[tuple[np.ndarray, Output]]:
        for start in range(0, len(indices), size):
            taken = np.arange(start, min(start + size, len(indices)))
            padded = np.resize(taken, size)
            host = {name: array[padded] for name, array in rows.items()}
            placed = to_global(host, generator.mesh, size)
            yield taken, generator(params, np.uint32(seed), **placed, **chosen)

    for taken, out in prefetch(begun()):
        here = Output(*(None if x is None else to_host(x)[: len(taken)] for x in out))
        sampler = chosen.get("sampler") or generator.sampling.sampler
        _require_finite(indices[taken][~here.finite], sampler)
        yield taken, here


def sample_batches(
    generator: Generator, params: Params, seed: int, indices: np.ndarray, **chosen: Any
) -> Iterator[SampleBatch]:
    """Samples `indices` with the labels of the generator's settings, a batch at a time.

    `chosen` may name guidances and a sampler, as for `Generator`.

    Raises:
      UserError: a sample is not finite.
    """
    labels = labels_of(generator.sampling, generator.num_classes, seed, indices)
    size = generator.batch_size
    for taken, out in outputs(generator, params, seed, indices, labels, size=size, **chosen):
        yield SampleBatch(indices[taken], out.decoded, labels[taken])


def _require_finite(failed: np.ndarray, sampler: Sampler) -> None:
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
