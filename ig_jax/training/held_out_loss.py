"""The flow loss of a trained network on examples that it was not trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Array

from ig_jax import prng
from ig_jax.experiment import Experiment
from ig_jax.models import trunk
from ig_jax.objectives.flow import FlowMatching
from ig_jax.objectives.token_groups import GroupSettings
from ig_jax.parallel.mesh import to_global, to_host
from ig_jax.types import Batch, Params

MOST = 4096  # examples
PASSES = 8  # over them, each with other noise and times


class HeldOutLoss:
    """Mean squared error of the final output, whatever else the network was trained on.

    Noise and times depend on the seed and on the place of an example alone, so that runs of one
    seed see the same. Of data sets without held-out examples, the first of the training set serve.
    """

    def __init__(self, exp: Experiment):
        source = exp.config.data.source
        self._source = source.held_out() or source
        self._codec, self._encoder = exp.config.data.codec, exp.encoder_weights
        self._objective = replace(
            exp.objective,
            terms={"flow": FlowMatching(1.0)},
            label_drop=0.0,
            groups=GroupSettings(),
        )
        self._mesh, self._size = exp.local_mesh, exp.config.sample.batch_size
        self._program = trunk.jit(self._each)

    def _each(self, params: Params, batch: Batch, encoder: Params, seed: Array, i: Array) -> Array:
        """The loss of each example [b] of a batch, with the draws of number i."""
        x0 = self._codec.latent(batch["stored"], prng.key(seed, "held-out codec", i), encoder)
        draws = self._objective.draw(prng.key(seed, "held-out loss", i), x0)
        return FlowMatching(1.0)(self._objective.forward(params, x0, batch["label"], draws))

    def __call__(self, params: Params, seed: int) -> float:
        """The mean over all examples and passes."""
        n, losses, seed = min(len(self._source), MOST), [], np.uint32(seed)
        for start in range(0, n, self._size):
            taken = np.arange(start, min(start + self._size, n))
            rows = self._source.batch(np.resize(taken, self._size))
            batch = to_global(rows, self._mesh, self._size)
            # Numbers of draws that no other batch has.
            numbers = np.arange(start, start + PASSES, dtype=np.int32)
            each = [self._program(params, batch, self._encoder, seed, i) for i in numbers]
            losses += [loss[: len(taken)] for loss in to_host(each)]
        return float(np.mean(np.concatenate(losses), dtype=np.float64))
