"""The protocol of feature spaces: images in, the vectors that metrics compare out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Integer, UInt8

from ig_jax.types import Params

ImageBatch = UInt8[Array, "b h w c"]
# The training images, uint8 [n, h, w, c], and their labels, integers [n].
TrainingImages = tuple[UInt8[np.ndarray, "n h w c"], Integer[np.ndarray, "n"]]


class Features(NamedTuple):
    """Features of a batch of images, float32."""

    pool: Float[Array, "b d"]  # Frechet distance, precision, recall
    # Inception score; None where the space is no classifier's.
    logits: Float[Array, "b c"] | None
    spatial: Float[Array, "b s"] | None  # sFID; None where the space has none


def require_grey_or_colour(images: ImageBatch) -> None:
    """Raises ValueError unless images have 3 channels, or 1."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images are {list(images.shape)}: must have 1 or 3 channels")


@runtime_checkable
class FeatureSpace(Protocol):
    """Maps images to features; a config's section `evaluate.features` or `.second_features`."""

    # What a Frechet distance is called here: 'fid' for Inception, 'fd_dinov2' for DINOv2, 'fd'
    # elsewhere.
    frechet: str
    gives: tuple[str, ...]  # which of the features it has
    # Whether the largest logit is the label: it was fitted on the data set.
    reads_labels: bool

    def load(self, images: Callable[[], TrainingImages]) -> Params:
        """The weights, as numpy arrays; `images` is called only by spaces that are fitted.

        Raises:
          UserError: there are none to be had.
        """
        ...

    def __call__(self, weights: Params, images: ImageBatch) -> Features:
        """Pure, so that it may be compiled; every image is treated alone."""
        ...
