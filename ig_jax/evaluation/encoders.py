"""The feature spaces that a config asks for, with their weights, on the devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from jax.sharding import Mesh

from ig_jax import pytree
from ig_jax.config.run_config import Config
from ig_jax.errors import UserError
from ig_jax.evaluation.feature_extractor import FeatureExtractor, Rows
from ig_jax.io.row_store import Row
from ig_jax.metrics.feature_space import FeatureSpace, TrainingImages
from ig_jax.parallel.mesh import local_mesh
from ig_jax.types import Encoded, Source

SECOND = "second"  # the row of the second encoder's features


@dataclass(frozen=True)
class Encoder:
    """A feature space with its weights.

    Attributes:
      look: gives features of images.
      digest: of the weights.
    """

    look: FeatureExtractor
    digest: str

    @property
    def space(self) -> FeatureSpace:
        return self.look.space

    def record(self) -> dict[str, str]:
        return {"name": type(self.space).__name__, "weights_sha256": self.digest}

    def rows(self, shape: tuple[int, ...]) -> dict[str, Row]:
        """Shapes and dtypes of the features of an image [h, w, c].

        Raises:
          UserError: it cannot see such images.
        """
        try:
            return self.look.rows(shape)
        except ValueError as error:
            raise UserError(f"{self.look.section}: {error}") from error


@dataclass(frozen=True)
class Encoders:
    """The feature space of all metrics, and perhaps a second one for its Frechet distance alone."""

    first: Encoder
    second: Encoder | None

    @property
    def distances(self) -> tuple[str, ...]:
        """Names of their Frechet distances."""
        return tuple(encoder.space.frechet for encoder in (self.first, self.second) if encoder)

    def __call__(self, images: np.ndarray) -> Rows:
        """Features of uint8 images [n, h, w, c]; those of the second encoder as 'second'."""
        rows = dict(self.first.look(images))
        if self.second is not None:
            rows[SECOND] = self.second.look(images)["pool"]
        return rows

    def rows(self, shape: tuple[int, ...]) -> dict[str, Row]:
        """Shapes and dtypes of what a call keeps of an image [h, w, c].

        Raises:
          UserError: one of them cannot see such images.
        """
        second = {} if self.second is None else {SECOND: self.second.rows(shape)["pool"]}
        return self.first.rows(shape) | second


def all_of(source: Source) -> TrainingImages:
    """All rows of a small source, and their labels."""
    batch = source.batch(np.arange(len(source)))
    return batch["stored"], batch["label"]


def holds_images(source: Source) -> bool:
    """Returns whether a source holds images, not latents or points."""
    return not isinstance(source, Encoded) and source.stored_dtype == np.uint8


def make_encoders(config: Config, mesh: Mesh) -> Encoders:
    """The feature spaces that `evaluate` asks for.

    A space that is fitted is fitted on the data set; `sample.batch_size` images of all processes
    are looked at together.

    Raises:
      UserError: a file is missing, or a space cannot be fitted on the data set.
    """
    asked = config.evaluate
    second = None
    if asked.second_features is not None:
        second = _encoder(config, mesh, asked.second_features, "evaluate.second_features")
    return Encoders(_encoder(config, mesh, asked.features, "evaluate.features"), second)


def _encoder(config: Config, mesh: Mesh, space: FeatureSpace, section: str) -> Encoder:
    source = config.data.source
    if space.reads_labels and not holds_images(source):
        raise UserError(
            f"{section}.name = 'classifier': is fitted on the images of data.source, which holds "
            "latents; use inception"
        )
    try:
        weights = space.load(partial(all_of, source))
    except UserError as error:
        raise UserError(f"{section}: {error}") from error
    own = local_mesh(mesh)
    here = config.sample.batch_size * own.size // mesh.size
    look = FeatureExtractor(space, weights, own, here, section)
    return Encoder(look, pytree.digest(weights))
