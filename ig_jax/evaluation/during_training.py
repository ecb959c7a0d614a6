"""Sample quality while training."""

from __future__ import annotations

import numpy as np

from ig_jax import guidance
from ig_jax.evaluation.feature_extractor import joined
from ig_jax.evaluation.image_evaluator import make_evaluator
from ig_jax.experiment import Experiment
from ig_jax.generation.batches import batches, labels_of
from ig_jax.generation.generator import Generator
from ig_jax.monitoring import console
from ig_jax.parallel.processes import allgather_rows, process_slice
from ig_jax.types import Params


class DuringTraining:
    """Judges a few samples of the weights as they are; guided as the config says.

    Without autoguidance: its other network need not exist yet while this one trains.
    """

    def __init__(self, exp: Experiment):
        self.exp, self.num = exp, exp.config.evaluate.while_training.num
        self.judge, _ = make_evaluator(exp)
        self.generator = Generator(exp, decode=self.judge.decode)
        self.judge.rows(self.generator.shape)  # raises now, not after hours, what does not fit
        self.guidances = guidance.only(exp.config.sample.guidances, ("ig", "cfg"))

    def measure(self, params: Params) -> dict[str, float]:
        """{'eval/fid', ...} of the first samples under the first seed of evaluation."""
        own, seed = np.array(process_slice(self.num)), self.exp.config.evaluate.seeds[0]
        drawn = batches(self.generator, params, seed, own, guidances=self.guidances)
        seen = []
        with console.progress(len(own), unit="image", what="evaluating") as bar:
            for batch in drawn:
                seen.append(self.judge.look(batch.images))
                bar.update(len(batch.indices))
        rows = {name: allgather_rows(own, self.num) for name, own in joined(seen).items()}
        labels = labels_of(self.exp.config, seed, np.arange(self.num))
        return {f"eval/{name}": value for name, value in self.judge.measure(rows, labels).items()}
