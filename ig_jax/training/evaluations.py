"""Looks at the averaged weights of a run while it trains: previews, metrics, a held-out loss."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import jax

from ig_jax.evaluation import during_training
from ig_jax.evaluation.image_evaluator import make_evaluator
from ig_jax.experiment import Experiment
from ig_jax.monitoring import console
from ig_jax.monitoring.metric_writer import MetricWriter
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState
from ig_jax.parallel.mesh import replicate_locally
from ig_jax.plots.losses import HELD_OUT
from ig_jax.training import preview
from ig_jax.training.held_out_loss import HeldOutLoss

PREVIEW, SAMPLES, LOSS = "preview", "evaluate", "held-out loss"


class Evaluations:
    """Those that a config asks for.

    Attributes:
      every: event -> every how many steps it happens.
    """

    def __init__(self, exp: Experiment, workdir: Path, writer: MetricWriter):
        c, asked = exp.config, exp.config.evaluate.while_training
        self._exp, self._workdir, self._writer = exp, workdir, writer
        wanted = {
            PREVIEW: c.log.samples_every_steps,
            SAMPLES: asked.every_steps,
            LOSS: asked.loss_every_steps,
        }
        if wanted[LOSS] and c.data.source.held_out() is None:
            console.say(f"no {HELD_OUT} is logged: data.source holds out no examples")
            wanted[LOSS] = 0
        self.every = {event: steps for event, steps in wanted.items() if steps}
        # Otherwise decoders and encoders would be read for nothing.
        if PREVIEW in self.every:
            self._preview = preview.Preview(exp.pipeline, workdir)
        if SAMPLES in self.every:
            evaluator, _ = make_evaluator(c, exp.mesh)
            self._samples = during_training.DuringTraining(
                exp.pipeline, evaluator, num=asked.num, seed=c.evaluate.seeds[0]
            )
        if LOSS in self.every:
            self._loss = HeldOutLoss(exp)

    @property
    def metrics(self) -> tuple[str, ...]:
        """A metric of each kind that is logged: the loss, the distance of the feature space."""
        features = self._exp.config.evaluate.features
        logged = {LOSS: HELD_OUT, SAMPLES: f"eval/{features.frechet}"}
        return tuple(name for event, name in logged.items() if event in self.every)

    def compute(self, due: Collection[str], state: TrainState, step: int, seen: int) -> None:
        """Computes and writes some of `every`.

        Args:
          state: of the training, after `step` updates.
          seen: images that those took.
        """
        averaged = ema.first(state.ema, self._exp.config.train.ema_decays)
        weights = replicate_locally(self._exp.mesh, averaged)
        if PREVIEW in due and jax.process_index() == 0:
            with console.room_or_not("previews", self._workdir):
                image = self._preview.draw(weights, step)
                self._writer.images(step, "samples", image)
        if SAMPLES in due:
            self._writer.scalars(step, self._samples.compute(weights))
        if LOSS in due:
            loss = self._loss(weights, self._exp.config.seed)
            self._writer.scalars(step, {"images": seen, HELD_OUT: loss})
