"""The numbers of one trained run: of its samples, of its features, its loss, what it cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.config.studies import LinearProbe
from ig_jax.errors import UserError
from ig_jax.evaluation import base
from ig_jax.evaluation.image_evaluator import make_evaluator
from ig_jax.experiment import Experiment
from ig_jax.generation.batches import labels_of, sample_batches
from ig_jax.generation.generator import Generator
from ig_jax.io.row_store import RowStore
from ig_jax.monitoring import console, metric_writer
from ig_jax.parallel.mesh import replicate_locally
from ig_jax.study import probe
from ig_jax.study.methods import Row
from ig_jax.training.held_out_loss import HeldOutLoss
from ig_jax.types import Params

LOSS, PROBE = "loss", "probe"


def weights(exp: Experiment, workdir: Path, step: int, which: str) -> Params:
    """Weights of a step of a run, whole on each device; `which` is as `sample.weights`."""
    with closing(checkpoint_manager.of_run(workdir, "--workdir")) as checkpoints:
        checkpoints.require_step(step, "step")
        params = checkpoints.weights(step, which, exp.replicated_params)
    return replicate_locally(exp.mesh, params)


def cost(exp: Experiment, workdir: Path) -> dict[str, float]:
    """Cost of training a run.

    train_flops: of all gradients, on paper (`monitoring.flops`).
    train_seconds: steps times the median seconds of a step, so that neither compiling nor a pause
      between two processes counts.
    """
    lines = metric_writer.read_metrics(workdir)
    seconds = [line["seconds/step"] for line in lines if "seconds/step" in line]
    each = exp.gradient_flops(exp.config.train.batch_size)
    return {
        "train_flops": float(exp.total_steps * each),
        "train_seconds": exp.total_steps * float(np.median(seconds)),
    }


class Bench:
    """Measures runs of one data set; what is expensive to make is made once.

    Programs are shared by all runs whose networks and ways of sampling are the same.
    """

    def __init__(self, exp: Experiment, measures: tuple[str, ...], settings: LinearProbe):
        """
        Args:
          exp: of the config that all runs change.
          measures: their names.
          settings: of the linear classifier.

        Raises:
          UserError: there is no such measure of this data set; what evaluating needs is missing.
        """
        self._exp, self._measures, self._probe = exp, measures, settings
        self._programs: dict[str, Any] = {}
        unknown = [m for m in measures if m not in (LOSS, PROBE) and m not in self._of_samples]
        if unknown:
            known = (*self._of_samples, LOSS, PROBE)
            raise UserError(f"measure {unknown[0]!r}: must be one of {', '.join(known)}")
        if PROBE in measures and not settings.blocks:
            raise UserError("study.probe.blocks = (): name the blocks whose tokens are classified")

    @cached_property
    def _evaluator(self) -> tuple[base.Evaluator, base.HeldOut | None]:
        return make_evaluator(self._exp.config, self._exp.mesh)

    @property
    def _of_samples(self) -> tuple[str, ...]:
        """Names of what is known of samples; () where none are asked for."""
        return self._evaluator[0].metrics if self.samples else ()

    @property
    def samples(self) -> bool:
        """Returns whether anything that is asked for takes samples."""
        return bool(set(self._measures) - {LOSS, PROBE})

    @property
    def names(self) -> list[str]:
        """Of all that a table shows, a probe for each block."""
        blocks = [probe.name(block, self._probe.time) for block in self._probe.blocks]
        return [n for m in self._measures for n in (blocks if m == PROBE else [m])]

    @property
    def _together(self) -> int:
        """Samples that are judged at a time: as many as are held out, for a fair comparison."""
        num, held_out = self._exp.config.evaluate.num, self._evaluator[1]
        return num if held_out is None else min(len(held_out[1]), num)

    @cached_property
    def floor(self) -> dict[str, float]:
        """The measures of held-out examples in place of samples; {} without either."""
        if not self.samples or self._evaluator[1] is None:
            return {}
        evaluator, held_out = self._evaluator
        return base.compute_in_runs(evaluator, *held_out, self._together)

    def measure(
        self, row: Row, seed: int, params: Params, guide: tuple[Row, Params] | None, folder: Path
    ) -> dict[str, float]:
        """All measures of a run.

        Args:
          row: its method.
          seed: of its training, and of what is drawn here.
          params: its weights, whole on each device.
          guide: method and weights of the network that autoguidance extrapolates from.
          folder: of the cell; what was seen of samples is kept there until `forget`.
        """
        found: dict[str, float] = {}
        if self.samples:
            found |= self._sampled(row, seed, params, guide, folder)
        if LOSS in self._measures:
            key = _key("loss", row, "model", "process")
            found[LOSS] = self._made(key, lambda: HeldOutLoss(row.exp))(params, seed)
        if PROBE in self._measures:
            found |= self._probed(row, seed, params)
        return found

    def _probed(self, row: Row, seed: int, params: Params) -> dict[str, float]:
        pipeline = replace(row.exp.pipeline, params=params)
        source = self._exp.config.data.source
        return probe.accuracy(pipeline, source, self._probe.blocks, self._probe.time, seed)

    def _made(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def _generator(self, row: Row, guide: tuple[Row, Params] | None) -> Generator:
        """The compiled sampler of a method, guided by the given network."""
        key = _key("sample", row, "model", "process", "sample")
        if guide is None:
            model = None
        else:
            model = replace(guide[0].exp.pipeline.guide_model, params=guide[1])
            key += _key("guide", guide[0], "model", "process")
        decode = self._evaluator[0].decode
        generator = self._made(key, lambda: row.exp.pipeline.generator(guide=model, decode=decode))
        generator.guide = model  # its parameters are an argument of the program
        return generator

    def _sampled(
        self,
        row: Row,
        seed: int,
        params: Params,
        guide: tuple[Row, Params] | None,
        folder: Path,
    ) -> dict[str, float]:
        num, (evaluator, _) = self._exp.config.evaluate.num, self._evaluator
        generator = self._generator(row, guide)
        store = RowStore(folder / ".samples", num, evaluator.rows(generator.shape))
        store.create()
        every = np.arange(num)
        missing = every[~store.done(every)]
        with console.progress(
            num, initial=num - len(missing), unit="image", what="sampling"
        ) as bar:
            for drawn in sample_batches(generator, params, seed, missing):
                store.write(drawn.indices, evaluator.extract(drawn.images))
                bar.update(len(drawn.indices))
        rows = {name: store.read(name) for name in store.names}
        labels = labels_of(row.exp.config.sample, row.exp.num_classes, seed, every)
        return base.compute_in_runs(evaluator, rows, labels, self._together)

    def forget(self, folder: Path) -> None:
        """Removes what `measure` kept in the folder of a cell."""
        RowStore(folder / ".samples", 0, {}).remove()


def _key(kind: str, row: Row, *sections: str) -> str:
    raw: Mapping[str, Any] = row.exp.config.raw
    return kind + json.dumps({name: raw[name] for name in sections}, sort_keys=True)
