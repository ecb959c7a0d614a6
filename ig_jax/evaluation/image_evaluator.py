"""Sample quality by features of images against those of real ones.

Evaluation has two halves. `extract` keeps a few rows of numbers of each image, and can be done a
batch at a time, on many devices, in many runs; `compute` needs all rows, and is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from ig_jax.config.run_config import Config
from ig_jax.errors import UserError
from ig_jax.evaluation.base import Evaluator, HeldOut
from ig_jax.evaluation.density_evaluator import DensityEvaluator
from ig_jax.evaluation.encoders import (
    SECOND,
    Encoder,
    Encoders,
    all_of,
    holds_images,
    make_encoders,
)
from ig_jax.evaluation.feature_extractor import Rows
from ig_jax.io.row_store import Row
from ig_jax.metrics import influence
from ig_jax.metrics import reference_statistics as statistics
from ig_jax.metrics.frechet import frechet_distance
from ig_jax.metrics.inception_score import inception_score, inception_score_torch_fidelity
from ig_jax.metrics.moments import Gaussian, Moments
from ig_jax.metrics.precision_recall import nearest_distance, precision_recall
from ig_jax.plots import image_grid

IS_SPLIT = 5000  # as ADM; one split at the size of the digits
SHOWN_ROWS = 5
# Where real images' statistics come from, for those who have none.
_PUBLISHED = (
    "ADM's VIRTUAL_imagenet256_labeled.npz (published with github.com/openai/guided-diffusion), or "
    "a file that --mode=reference wrote"
)


@dataclass(frozen=True)
class Real:
    """Statistics of real images."""

    field: str  # of the config that names them
    pool: Gaussian
    spatial: Gaussian | None  # None: sFID cannot be computed
    # Gives features of single ones, which may take looking at them; None: nor precision and recall.
    rows: Callable[[], np.ndarray] | None
    record: Mapping[str, Any]


@dataclass(frozen=True)
class ImageEvaluator:
    """Features against those of real images, by the definitions of the ADM evaluator."""

    encoders: Encoders
    real: Real
    second_real: Real | None  # None: there is no second encoder
    # Images that a sample may be a copy of; None: too many to ask.
    training: np.ndarray | None

    decode: ClassVar[None] = None
    shows_readout: ClassVar[bool] = False

    @cached_property
    def _training_pixels(self) -> np.ndarray:
        return _pixels(self.training)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `compute` gives, but for the second rule of the inception score."""
        space, real = self.encoders.first.space, self.real
        present = {
            **dict.fromkeys(self.encoders.distances, True),
            "sfid": real.spatial is not None and "spatial" in space.gives,
            "accuracy": space.reads_labels,
            "precision": real.rows is not None,
            "recall": real.rows is not None,
            "inception_score": "logits" in space.gives,
            "nearest": self.training is not None,
        }
        return tuple(name for name, there in present.items() if there)

    def extract(self, images: np.ndarray) -> Rows:
        """Of uint8 images [n, h, w, c]: features, and the distance to the nearest real one."""
        rows = dict(self.encoders(images))
        if self.training is not None:
            rows["nearest"] = nearest_distance(_pixels(images), self._training_pixels)
        return rows

    def rows(self, shape: tuple[int, ...]) -> dict[str, Row]:
        """Shapes and dtypes of what `extract` keeps of an image [h, w, c].

        Raises:
          UserError: a feature space cannot see such images, or the real ones' statistics are of
            other features.
        """
        rows = self.encoders.rows(shape)
        known = {"pool": self.real.pool, "spatial": self.real.spatial}
        _require_same(known, rows, self.encoders.first, self.real)
        if self.second_real is not None:
            known = {SECOND: self.second_real.pool}
            _require_same(known, rows, self.encoders.second, self.second_real)
        near = {} if self.training is None else {"nearest": Row((), np.float64)}
        return rows | near

    def compute(self, rows: Rows, labels: np.ndarray | None) -> dict[str, float]:
        """All metrics of images that `extract` saw, meant to show classes `labels` [n] (or None).

        fid (fd in other feature spaces), sfid: squared Frechet distances to the real images; also
          that of the second encoder.
        inception_score: mean over runs of 5000 in the given order; also by torch-fidelity's rule.
        precision, recall: shares, k = 3.
        accuracy: share that is read as the class asked for.
        nearest: median Euclidean distance, in pixels of range [-1, 1], to the nearest training
          image; well below the held-out images' own value, it means memorised ones.
        """
        space, real = self.encoders.first.space, self.real
        measures = {
            name: frechet_distance(known, _gaussian(rows[row]))
            for name, row, known in self._distances()
            if row in rows
        }
        if space.reads_labels and labels is not None:
            measures["accuracy"] = float(np.mean(np.argmax(rows["logits"], axis=1) == labels))
        if real.rows is not None:
            measures |= precision_recall(real.rows(), rows["pool"])._asdict()
        if "logits" in rows:
            measures["inception_score"], _ = inception_score(rows["logits"], IS_SPLIT)
            mean, _ = inception_score_torch_fidelity(rows["logits"])
            measures["inception_score_torch_fidelity"] = mean
        if "nearest" in rows:
            measures["nearest"] = float(np.median(rows["nearest"]))
        return measures

    def standard_errors(self, rows: Rows, measures: Mapping[str, float]) -> dict[str, float]:
        """Standard errors of the measures that `compute` gave of these rows, where they are known.

        Of other samples of the same network; of recall, of other real images. Frechet distances
        have one where there are twice as many samples as features (`metrics.influence`).
        """
        n, real = len(rows["pool"]), self.real
        errors = {}
        for name, row, known in self._distances():
            if name in measures and n >= 2 * rows[row].shape[1]:
                influences = influence.of_frechet_distance(known, rows[row])
                errors[name] = influence.standard_error(influences)
        if "inception_score" in measures:
            influences = influence.of_inception_score(rows["logits"])
            errors["inception_score"] = influence.standard_error(influences)
        counted = {"accuracy": n, "precision": n}
        if "recall" in measures:
            counted["recall"] = len(real.rows())
        for name in counted.keys() & measures.keys():
            share = measures[name]
            errors[name] = float(np.sqrt(share * (1 - share) / counted[name]))
        return {name: errors[name] for name in measures if name in errors}

    def _distances(self) -> list[tuple[str, str, Gaussian]]:
        """(Name, row of features, statistics of real images) of every Frechet distance."""
        first, *second = self.encoders.distances
        known = [(first, "pool", self.real.pool)]
        known += [(name, SECOND, self.second_real.pool) for name in second]
        known += [("sfid", "spatial", self.real.spatial)]
        return [distance for distance in known if distance[2] is not None]

    def record(self) -> dict[str, Any]:
        """Everything that the metrics depend on, besides the samples."""
        second = {}
        if self.second_real is not None:
            second["second_features"] = self.encoders.second.record()
            second["second_reference"] = dict(self.second_real.record)
        return {
            "features": self.encoders.first.record(),
            "reference": dict(self.real.record),
            "k": 3,
            "split": IS_SPLIT,
            **second,
        }

    def draw(
        self,
        path: Path,
        drawn: Mapping[str, tuple[np.ndarray, np.ndarray]],
        results: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """The first samples of every way side by side, a column for each class, as PNG."""
        columns = min(int(max(labels.max() for _, labels in drawn.values())) + 1, 10)
        grids = {}
        for name, (images, labels) in drawn.items():
            chosen = [np.flatnonzero(labels == c)[:SHOWN_ROWS] for c in range(columns)]
            rows = min(map(len, chosen))
            order = np.array([c[:rows] for c in chosen]).T.reshape(-1)
            grids[name] = image_grid.grid(images[order], columns, least_side=32)
        image_grid.save(path, image_grid.panels(grids))


def _gaussian(features: np.ndarray) -> Gaussian:
    return Moments.from_features(features).gaussian


def _require_same(
    known: Mapping[str, Gaussian | None], rows: Mapping[str, Row], encoder: Encoder, real: Real
) -> None:
    """Raises UserError unless real images' statistics have as many numbers as an image's rows."""
    for name, gaussian in known.items():
        if gaussian is not None and name in rows and rows[name].shape != gaussian.mean.shape:
            raise UserError(
                f"{real.field} = {real.record.get('file')!r}: is of features with "
                f"{gaussian.mean.size} numbers, but {type(encoder.space).__name__} gives "
                f"{rows[name].shape[0]}; choose statistics of the same features"
            )


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1


def _from_file(path: Path, encoder: Encoder, field: str) -> Real:
    reference = statistics.read(path, field, encoder.space.frechet)
    if reference.space not in ("", encoder.digest):
        raise UserError(
            f"{field} = {str(path)!r}: was made with other weights of the feature space than "
            f"{encoder.look.section} has; make it again with --mode=reference"
        )
    single = reference.images if reference.rows is None else reference.rows
    record = {
        "file": str(path),
        "sha256": reference.digest,
        # The name that records have always had: folders are named after them.
        "pictures_of_precision_and_recall": 0 if single is None else len(single),
    }
    # An evaluation that is done already need not look at ten thousand images again.
    seen = cache(partial(encoder.look, reference.images))
    pool, spatial, rows = reference.pool, reference.spatial, None
    if pool is None:  # there are no other statistics than those of these images
        pool = _gaussian(seen()["pool"])
        spatial = _gaussian(seen()["spatial"]) if "spatial" in seen() else None
    if single is not None:
        rows = (lambda: seen()["pool"]) if reference.rows is None else (lambda: reference.rows)
    return Real(field, pool, spatial, rows, record)


def make_evaluator(config: Config, mesh: Mesh) -> tuple[Evaluator, HeldOut | None]:
    """The evaluator of a run's data set, and what it keeps of held-out examples, if there are any.

    Raises:
      UserError: a file of the feature space or of the real images is missing or does not fit.
    """
    source = config.data.source
    held_out = source.held_out()
    if hasattr(source, "log_density"):
        evaluator = DensityEvaluator(source, held_out)
    else:
        evaluator = _by_features(config, mesh)
    if held_out is None or (isinstance(evaluator, ImageEvaluator) and not holds_images(held_out)):
        return evaluator, None
    images, labels = all_of(held_out)
    evaluator.rows(images.shape[1:])  # raises what does not fit
    return evaluator, (evaluator.extract(images), labels)


def _by_features(config: Config, mesh: Mesh) -> ImageEvaluator:
    asked, encoders = config.evaluate, make_encoders(config, mesh)
    first, second = encoders.first, encoders.second
    training = all_of(config.data.source)[0] if first.space.reads_labels else None
    real = _real(config, first, asked.reference, "evaluate.reference")
    second_real = None
    if second is not None:
        second_real = _real(config, second, asked.second_reference, "evaluate.second_reference")
    return ImageEvaluator(encoders, real, second_real, training)


def _real(config: Config, encoder: Encoder, reference: str | None, field: str) -> Real:
    if reference is not None:
        return _from_file(Path(reference), encoder, field)
    if not encoder.space.reads_labels:
        raise UserError(f"{field} = None: name statistics of real images: {_PUBLISHED}")
    images = all_of(config.data.source)[0]
    seen = encoder.look(images)
    # As above: "pictures" is the name in all records.
    record = {"source": config.raw["data"]["source"], "pictures": len(images)}
    return Real(field, _gaussian(seen["pool"]), None, lambda: seen["pool"], record)
