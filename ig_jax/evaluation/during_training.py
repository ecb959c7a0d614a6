"""Sample quality while training."""

from __future__ import annotations

import numpy as np

from ig_jax import guidance
from ig_jax.evaluation.base import Evaluator
from ig_jax.evaluation.feature_extractor import concatenate_rows
from ig_jax.generation.batches import labels_of, sample_batches
from ig_jax.monitoring import console
from ig_jax.parallel.processes import allgather_rows, process_slice
from ig_jax.pipeline import Pipeline
from ig_jax.types import Params


class DuringTraining:
    """Evaluates a few samples of the weights as they are; guided as the config says.

    Without autoguidance: its other network need not exist yet while this one trains.
    """

    def __init__(self, pipeline: Pipeline, evaluator: Evaluator, *, num: int, seed: int):
        """
        Args:
          pipeline: samples; its parameters are not used.
          evaluator: of the data set.
          num: samples.
          seed: of the samples.

        Raises:
          UserError: the evaluator cannot see such samples.
        """
        self._evaluator, self._num, self._seed = evaluator, num, seed
        self._generator = pipeline.generator(decode=evaluator.decode)
        evaluator.rows(self._generator.shape)  # raises now, not after hours, what does not fit
        self._guidances = guidance.only(pipeline.sampling.guidances, ("ig", "cfg"))

    def compute(self, params: Params) -> dict[str, float]:
        """{'eval/fid', ...} of the first samples."""
        own, generator = np.array(process_slice(self._num)), self._generator
        parts = []
        with console.progress(len(own), unit="image", what="evaluating") as bar:
            for batch in sample_batches(
                generator, params, self._seed, own, guidances=self._guidances
            ):
                parts.append(self._evaluator.extract(batch.images))
                bar.update(len(batch.indices))
        rows = {
            name: allgather_rows(own, self._num) for name, own in concatenate_rows(parts).items()
        }
        every = np.arange(self._num)
        labels = labels_of(generator.sampling, generator.num_classes, self._seed, every)
        measures = self._evaluator.compute(rows, labels)
        return {f"eval/{name}": value for name, value in measures.items()}
