"""Linear probing: how well linear classifiers read the classes off a frozen network's features.

Every block at every noise level is a cell with a classifier of its own. All are trained in one pass
over the data, on features that are computed once a batch and never stored. A validation share of
the training set chooses the cell, and the test set is looked at once, for the chosen cell.

The protocol follows what is public of DDAE++ (arXiv 2505.10999; github.com/FutureXiang/ddae and
edm2), which chooses the cell on the test set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from ig_jax.checkpoint.state_file import StateFile
from ig_jax.config.probe import Probe
from ig_jax.data.subset import Subset, split
from ig_jax.errors import UserError
from ig_jax.evaluation.pooled_features import features_at, inputs_of
from ig_jax.evaluation.prober import Prober, of_cell
from ig_jax.parallel.mesh import local_mesh
from ig_jax.pipeline import Pipeline
from ig_jax.types import Source


class Share(NamedTuple):
    """A number of right answers among a number of images."""

    right: int
    images: int

    @property
    def accuracy(self) -> float:
        return self.right / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, for images drawn at random."""
        n, p, z2 = self.images, self.accuracy, 1.959964**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
        return centre - half, centre + half


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Results of probing.

    Attributes:
      times, blocks: of the grid.
      validation: accuracy of every cell on the validation share, [times, blocks].
      time, block: of the cell that is best there; of equal ones the first by time, then block.
      chosen: its right answers there.
      test: the same on the test set; None where there is none.
      neighbours: right answers of k-NN on the features of that cell, on the test set, or on the
        validation share where there is none; None where it was not asked for.
      trained_on: images that the classifiers were trained on.
    """

    times: tuple[float, ...]
    blocks: tuple[int, ...]
    validation: np.ndarray
    time: float
    block: int
    chosen: Share
    test: Share | None
    neighbours: Share | None
    trained_on: int


def probe_grid(
    prober: Prober, train: Source, test: Source | None, saved: StateFile | None = None
) -> ProbeResult:
    """Trains on `train` but for its validation share, chooses by that, and tests the chosen cell.

    Raises:
      UserError: there are too few images or classes; an image cannot be read; features are not
        finite.
    """
    s = prober.settings
    kept, validation = _parts(s, train, prober.mesh)
    state = prober.train(kept, saved)
    right = prober.right(state, validation)
    i, j = map(int, np.unravel_index(np.argmax(right), right.shape))
    cell = prober.cell(prober.times[i], prober.blocks[j])
    bank = Subset(kept, np.arange(min(s.bank, len(kept)))) if s.neighbours else None
    last = validation if test is None else test
    answers = cell.compare(of_cell(state, i, j), last, bank)
    return ProbeResult(
        times=prober.times,
        blocks=prober.blocks,
        validation=right / len(validation),
        time=prober.times[i],
        block=prober.blocks[j],
        chosen=Share(int(right[i, j]), len(validation)),
        test=None if test is None else Share(answers.classifier, len(test)),
        neighbours=None if bank is None else Share(answers.neighbours, len(last)),
        trained_on=len(kept),
    )


def require_classes(source: Source) -> None:
    """Raises UserError where a data set has no classes, or only one."""
    if source.num_classes < 2:
        raise UserError(
            f"data.source.num_classes = {source.num_classes}: a probe needs images of two classes "
            "or more; name a data set with labels"
        )


def _parts(s: Probe, train: Source, mesh: Mesh) -> tuple[Subset, Subset]:
    """The training set without its validation share, and that; checked."""
    require_classes(train)
    if s.batch_size % mesh.size:
        raise UserError(
            f"probe.batch_size = {s.batch_size}: must divide over {mesh.size} devices; the next "
            f"that does: {-(-s.batch_size // mesh.size) * mesh.size}"
        )
    try:
        kept, validation = split(train, s.validation_share, s.seed)
    except ValueError as error:
        raise UserError(f"data.source: {error}") from error
    if len(kept) < s.batch_size:
        raise UserError(
            f"probe.batch_size = {s.batch_size}: must not exceed the {len(kept)} images that "
            f"{len(validation)} of validation leave"
        )
    if s.neighbours > min(s.bank, len(kept)):
        raise UserError(
            f"probe.neighbours = {s.neighbours}: must not exceed the {min(s.bank, len(kept))} "
            "images among which they are sought; lower it, or raise probe.bank"
        )
    return kept, validation


def probe(
    pipeline: Pipeline,
    train: Source,
    test: Source | None,
    settings: Probe,
    saved: StateFile | None = None,
) -> ProbeResult:
    """Probes a network; see `probe_grid`.

    Args:
      pipeline: the frozen network, with its parameters.
      train: labelled images or latents, as the pipeline's codec reads them.
      test: others; None: there are none.
      settings: of the section `probe`.
      saved: where the classifiers are kept meanwhile, so that a killed call is gone on with.

    Raises:
      UserError: as `probe_grid`, or the network has no such block or no null class.
    """
    mesh, depth = local_mesh(pipeline.mesh), pipeline.net.settings.depth
    blocks = settings.blocks or tuple(range(1, depth + 1))
    if max(blocks) > depth:
        raise UserError(f"probe.blocks = {settings.blocks}: must lie in 1..{depth}")
    if settings.labels == "true" and train.num_classes != pipeline.num_classes:
        raise UserError(
            f"probe.labels = 'true': the network knows {pipeline.num_classes} classes, the data "
            f"have {train.num_classes}; set it to 'null'"
        )
    prober = Prober(
        features_at(pipeline, settings, mesh),
        inputs_of(pipeline, train.stored_shape, mesh),
        pipeline.net.settings.hidden_size,
        train.num_classes,
        settings.times,
        blocks,
        settings,
        mesh,
    )
    return probe_grid(prober, train, test, saved)
