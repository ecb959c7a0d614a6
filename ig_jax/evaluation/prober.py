"""Training and evaluating the linear classifiers of a grid of features, a batch at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ig_jax.checkpoint.state_file import StateFile
from ig_jax.config.probe import Probe
from ig_jax.data import loader
from ig_jax.data.read_ahead import Unreadable, read_batches
from ig_jax.errors import UserError
from ig_jax.evaluation.pooled_features import FeatureFn, FeaturesAt, Rows
from ig_jax.metrics import nearest_neighbours
from ig_jax.metrics.linear_probe import Features, LinearProbes, PerCell, ProbeState
from ig_jax.monitoring import console
from ig_jax.parallel.mesh import replicated, to_global, to_host
from ig_jax.types import Source

_READERS = 16  # images read at the same time; most of that is waiting for files


class Bank(NamedTuple):
    """Features of unit length of images whose classes are known."""

    features: Float[Array, "n d"]
    labels: Int[Array, "n"]


class Right(NamedTuple):
    """Numbers of right answers."""

    classifier: int
    neighbours: int | None  # None: there is no bank


@dataclass(frozen=True, eq=False)
class Prober:
    """The classifiers of a grid of cells, and what they see.

    Attributes:
      features: gives the features of chosen noise levels and blocks.
      inputs: what they are computed from, on the devices of `mesh`.
      width: channels of a feature.
      classes: of the data.
      times, blocks: of the grid.
      settings: of the training.
      mesh: devices, each with rows of a batch.
    """

    features: FeaturesAt
    inputs: Any
    width: int
    classes: int
    times: tuple[float, ...]
    blocks: tuple[int, ...]
    settings: Probe
    mesh: Mesh

    def cell(self, time: float, block: int) -> Prober:
        """The same for one cell alone."""
        return replace(self, times=(time,), blocks=(block,))

    def _probes(self, images: int = 0) -> LinearProbes:
        """The classifiers; `images` are those that they are trained on."""
        s = self.settings
        steps = max(1, math.ceil(s.epochs * images / s.batch_size))
        grid, optimizer = (len(self.times), len(self.blocks)), (s.learning_rate, s.weight_decay)
        return LinearProbes(grid, self.width, self.classes, steps, *optimizer, s.norm)

    def train(self, source: Source, saved: StateFile | None = None) -> ProbeState:
        """Trains all classifiers, going on from what is saved; the end is saved, too.

        Raises:
          UserError: features are not finite; an image cannot be read.
        """
        s, probes = self.settings, self._probes(len(source))
        seen = self.features(self.times, self.blocks)
        update = jax.jit(partial(_update, probes, seen), donate_argnums=0)
        found = None if saved is None else saved.load(jax.eval_shape(probes.init))
        state = jax.device_put(probes.init() if found is None else found, replicated(self.mesh))
        start, size, losses = int(state.step), s.batch_size, None
        batches = loader.batches(source, size, s.seed, start=start * size)
        numbers = {"number": np.arange(size, dtype=np.int32)}
        total, done = probes.steps * size, start * size
        with console.progress(total, initial=done, unit="image", what="probing") as bar:
            bar.set_postfix_str("compiling")
            for step in range(start, probes.steps):
                begun, before = time.perf_counter(), losses
                rows = to_global({**next(batches), **numbers}, self.mesh, size)
                state, losses = update(state, self.inputs, rows)
                jax.block_until_ready(before)  # one step ahead of the devices, not all
                if step == start:
                    console.leave_out(bar, time.perf_counter() - begun)
                    bar.set_postfix_str("")
                bar.update(size)
                last = step + 1 == probes.steps
                if last or (saved is not None and (step + 1) % s.save_every_steps == 0):
                    self._require_finite(losses)
                    if saved is not None:
                        saved.save(state)
        return state

    def _require_finite(self, losses: PerCell) -> None:
        for i, j in np.argwhere(~np.isfinite(to_host(losses)))[:1]:
            raise UserError(
                f"probe: block {self.blocks[j]} at t = {self.times[i]:g} has features, or its "
                "classifier a loss, that are not finite; lower probe.learning_rate, or look at the "
                "weights"
            )

    def right(self, state: ProbeState, source: Source) -> Int[np.ndarray, "t l"]:
        """Right answers of every cell on all images of a source."""
        seen = self.features(self.times, self.blocks)
        count = jax.jit(partial(_count, self._probes(), seen))
        total = np.zeros((len(self.times), len(self.blocks)), int)
        with console.progress(len(source), unit="image", what="validating") as bar:
            for rows, n in self._batches(source):
                total += to_host(count(state, self.inputs, rows))
                bar.update(n)
        return total

    def compare(self, state: ProbeState, source: Source, bank: Source | None) -> Right:
        """Right answers of the only cell's classifier, and of the nearest neighbours in `bank`."""
        seen = jax.jit(partial(_seen, self.features(self.times, self.blocks)))
        known = None if bank is None else self._remember(bank, seen)
        k = 0 if bank is None else self.settings.neighbours
        count = jax.jit(partial(_compare, self._probes(), k))
        totals = np.zeros(2, int)
        with console.progress(len(source), unit="image", what="testing") as bar:
            for rows, n in self._batches(source):
                totals += to_host(count(state, seen(self.inputs, rows), rows, known))
                bar.update(n)
        return Right(int(totals[0]), None if bank is None else int(totals[1]))

    def _remember(self, source: Source, seen: Callable[..., Array]) -> Bank:
        """Features, by `seen`, of all images of a source with one cell."""
        features, labels = [], []
        with console.progress(len(source), unit="image", what="remembering") as bar:
            for rows, n in self._batches(source):
                features.append(to_host(seen(self.inputs, rows))[0, 0, :n])
                labels.append(to_host(rows["label"])[:n])
                bar.update(n)
        found = jax.device_put(np.concatenate(features), replicated(self.mesh))
        labels = jax.device_put(np.concatenate(labels), replicated(self.mesh))
        return Bank(nearest_neighbours.unit_length(found), labels)

    def _batches(self, source: Source) -> Iterator[tuple[dict[str, jax.Array], int]]:
        """All images in order, on the devices, and how many of a batch are none of its padding."""
        size = self.settings.batch_size
        with ThreadPoolExecutor(_READERS) as readers:
            for examples in read_batches(source, range(len(source)), size, readers):
                for example in examples:
                    if isinstance(example, Unreadable):
                        raise UserError(f"{example.reason}; accuracies are of all images or none")
                n, filled = len(examples), np.arange(size) % len(examples)
                rows = {
                    "stored": np.stack([example.row for example in examples])[filled],
                    "label": np.array([example.label for example in examples], np.int32)[filled],
                    "number": np.array([example.index for example in examples], np.int32)[filled],
                    "counts": np.arange(size) < n,
                }
                yield to_global(rows, self.mesh, size), n


def of_cell(state: ProbeState, i: int, j: int) -> ProbeState:
    """The classifier of one cell, to be evaluated."""

    def cut(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[i : i + 1, j : j + 1], tree)

    heads, mean, variance = cut((state.heads, state.mean, state.variance))
    return state.replace(heads=heads, opt_state=None, mean=mean, variance=variance)


# Compiled programs. Step 0 is evaluation's, see `FeatureFn`.


def _update(
    probes: LinearProbes, seen: FeatureFn, state: ProbeState, inputs: Any, rows: Rows
) -> tuple[ProbeState, PerCell]:
    return probes.update(state, seen(inputs, rows, state.step + 1), rows["label"])


def _are_right(
    probes: LinearProbes, state: ProbeState, features: Features, rows: Rows
) -> Bool[Array, "t l b"]:
    answers = jnp.argmax(probes.logits(state, features), axis=-1)
    return (answers == rows["label"][None, None]) & rows["counts"][None, None]


def _count(
    probes: LinearProbes, seen: FeatureFn, state: ProbeState, inputs: Any, rows: Rows
) -> Int[Array, "t l"]:
    return _are_right(probes, state, _seen(seen, inputs, rows), rows).sum(axis=-1)


def _seen(seen: FeatureFn, inputs: Any, rows: Rows) -> Features:
    return seen(inputs, rows, jnp.int32(0))


def _compare(
    probes: LinearProbes,
    k: int,
    state: ProbeState,
    features: Features,
    rows: Rows,
    bank: Bank | None,
) -> Int[Array, "2"]:
    classifier = _are_right(probes, state, features, rows).sum()
    if bank is None:
        return jnp.stack([classifier, 0])
    queries = nearest_neighbours.unit_length(features[0, 0])
    voted = nearest_neighbours.vote(queries, *bank, k=k, num_classes=probes.classes)
    return jnp.stack([classifier, jnp.sum((voted == rows["label"]) & rows["counts"])])
