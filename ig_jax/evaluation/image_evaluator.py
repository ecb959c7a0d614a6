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

from ig_jax import pytree
from ig_jax.config.run_config import Config
from ig_jax.errors import UserError
from ig_jax.evaluation.base import Evaluator, HeldOut
from ig_jax.evaluation.density_evaluator import DensityEvaluator
from ig_jax.evaluation.feature_extractor import FeatureExtractor, Rows
from ig_jax.io.row_store import Row
from ig_jax.metrics import influence
from ig_jax.metrics import reference_statistics as statistics
from ig_jax.metrics.frechet import frechet_distance
from ig_jax.metrics.inception_score import inception_score, inception_score_torch_fidelity
from ig_jax.metrics.moments import Gaussian, Moments
from ig_jax.metrics.precision_recall import nearest_distance, precision_recall
from ig_jax.parallel.mesh import local_mesh
from ig_jax.plots import image_grid
from ig_jax.types import Encoded, Source

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

    pool: Gaussian
    spatial: Gaussian | None  # None: sFID cannot be computed
    # Gives features of single ones, which may take looking at them; None: nor precision and recall.
    rows: Callable[[], np.ndarray] | None
    record: Mapping[str, Any]


@dataclass(frozen=True)
class ImageEvaluator:
    """Features against those of real images, by the definitions of the ADM evaluator."""

    features: FeatureExtractor
    real: Real
    # Images that a sample may be a copy of; None: too many to ask.
    training: np.ndarray | None
    weights_digest: str  # of the feature space

    decode: ClassVar[None] = None
    shows_readout: ClassVar[bool] = False

    @cached_property
    def _training_pixels(self) -> np.ndarray:
        return _pixels(self.training)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `compute` gives, but for the second rule of the inception score."""
        space, real = self.features.space, self.real
        present = {
            space.frechet: True,
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
        rows = dict(self.features(images))
        if self.training is not None:
            rows["nearest"] = nearest_distance(_pixels(images), self._training_pixels)
        return rows

    def rows(self, shape: tuple[int, ...]) -> dict[str, Row]:
        """Shapes and dtypes of what `extract` keeps of an image [h, w, c].

        Raises:
          UserError: the feature space cannot see such images, or the real ones' statistics are
            of other features.
        """
        try:
            rows = self.features.rows(shape)
        except ValueError as error:
            raise UserError(f"evaluate.features: {error}") from error
        for name, known in (("pool", self.real.pool), ("spatial", self.real.spatial)):
            if known is not None and name in rows and rows[name].shape != known.mean.shape:
                raise UserError(
                    f"evaluate.reference = {self.real.record.get('file')!r}: is of features with "
                    f"{known.mean.size} numbers, but {type(self.features.space).__name__} gives "
                    f"{rows[name].shape[0]}; choose statistics of the same features"
                )
        near = {} if self.training is None else {"nearest": Row((), np.float64)}
        return rows | near

    def compute(self, rows: Rows, labels: np.ndarray | None) -> dict[str, float]:
        """All metrics of images that `extract` saw, meant to show classes `labels` [n] (or None).

        fid (fd in other feature spaces), sfid: squared Frechet distances to the real images.
        inception_score: mean over runs of 5000 in the given order; also by torch-fidelity's rule.
        precision, recall: shares, k = 3.
        accuracy: share that is read as the class asked for.
        nearest: median Euclidean distance, in pixels of range [-1, 1], to the nearest training
          image; well below the held-out images' own value, it means memorised ones.
        """
        space, real = self.features.space, self.real
        measures = {space.frechet: frechet_distance(real.pool, _gaussian(rows["pool"]))}
        if real.spatial is not None and "spatial" in rows:
            measures["sfid"] = frechet_distance(real.spatial, _gaussian(rows["spatial"]))
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
        for name, feature, known in (
            (self.features.space.frechet, "pool", real.pool),
            ("sfid", "spatial", real.spatial),
        ):
            if name in measures and n >= 2 * rows[feature].shape[1]:
                influences = influence.of_frechet_distance(known, rows[feature])
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

    def record(self) -> dict[str, Any]:
        """Everything that the metrics depend on, besides the samples."""
        space = {"name": type(self.features.space).__name__, "weights_sha256": self.weights_digest}
        return {"features": space, "reference": dict(self.real.record), "k": 3, "split": IS_SPLIT}

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


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1


def all_of(source: Any) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a small source, and their labels."""
    batch = source.batch(np.arange(len(source)))
    return batch["stored"], batch["label"]


def holds_images(source: Source) -> bool:
    """Returns whether a source holds images, not latents or points."""
    return not isinstance(source, Encoded) and source.stored_dtype == np.uint8


def make_feature_extractor(config: Config, mesh: Mesh) -> tuple[FeatureExtractor, str]:
    """The feature space that `evaluate.features` asks for, and the hash of its weights.

    A space that is fitted is fitted on the data set; `sample.batch_size` images of all processes
    are looked at together.

    Raises:
      UserError: its file is missing, or it cannot be fitted on the data set.
    """
    space, source = config.evaluate.features, config.data.source
    if space.reads_labels and not holds_images(source):
        raise UserError(
            "evaluate.features.name = 'classifier': is fitted on the images of data.source, "
            "which holds latents; use inception"
        )
    weights = space.load(partial(all_of, source))
    own = local_mesh(mesh)
    here = config.sample.batch_size * own.size // mesh.size
    return FeatureExtractor(space, weights, own, here), pytree.digest(weights)


def _from_file(path: Path, look: FeatureExtractor, weights_digest: str) -> Real:
    field = "evaluate.reference"
    reference = statistics.read(path, field)
    if reference.space not in ("", weights_digest):
        raise UserError(
            f"{field} = {str(path)!r}: was made with other weights of the feature space than "
            "evaluate.features has; make it again with --mode=reference"
        )
    single = reference.images if reference.rows is None else reference.rows
    record = {
        "file": str(path),
        "sha256": reference.digest,
        # The name that records have always had: folders are named after them.
        "pictures_of_precision_and_recall": 0 if single is None else len(single),
    }
    # An evaluation that is done already need not look at ten thousand images again.
    seen = cache(partial(look, reference.images))
    pool, spatial, rows = reference.pool, reference.spatial, None
    if pool is None:  # there are no other statistics than those of these images
        pool = _gaussian(seen()["pool"])
        spatial = _gaussian(seen()["spatial"]) if "spatial" in seen() else None
    if single is not None:
        rows = (lambda: seen()["pool"]) if reference.rows is None else (lambda: reference.rows)
    return Real(pool, spatial, rows, record)


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
    look, digest = make_feature_extractor(config, mesh)
    reference = config.evaluate.reference
    fitted = look.space.reads_labels
    training = all_of(config.data.source)[0] if fitted else None
    if reference is not None:
        real = _from_file(Path(reference), look, digest)
    elif fitted:
        seen = look(training)
        # As above: "pictures" is the name in all records.
        record = {"source": config.raw["data"]["source"], "pictures": len(training)}
        real = Real(_gaussian(seen["pool"]), None, lambda: seen["pool"], record)
    else:
        raise UserError(f"evaluate.reference = None: name statistics of real images: {_PUBLISHED}")
    return ImageEvaluator(look, real, training, digest)
