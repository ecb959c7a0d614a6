"""Inception's features as FID, sFID, the inception score, precision and recall are published on.

Images are brought to 299 x 299 as the TensorFlow graph of the network does it, and as no current
library does by default. Along an axis of n pixels,

  s = i n / 299,  l = floor(s),  out_i = in_l + (in_min(l+1, n-1) - in_l) (s - l),

without the half pixel by which others shift s and without a filter when shrinking; then
(x - 128) / 128. With half a pixel, `pool` is off by 0.3 to 1.1 % and `spatial` by 6 to 29 % (root
mean squares; the random weights and images of the tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ig_jax.bounds import unset
from ig_jax.io.paths import Location
from ig_jax.metrics import inception_network, inception_weights, published_weights
from ig_jax.metrics.feature_space import (
    Features,
    ImageBatch,
    TrainingImages,
    require_grey_or_colour,
)
from ig_jax.types import Params

PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
SIDE = 299


@dataclass(frozen=True)
class Inception:
    """The feature space of FID: `pool` [b, 2048], `logits` [b, 1008], `spatial` [b, 2023]."""

    # the published .pth, or a .safetensors with the same names
    weights: Location | None = unset("")

    frechet: ClassVar[str] = "fid"
    gives: ClassVar[tuple[str, ...]] = ("pool", "logits", "spatial")
    # Its classes are its own, and in an order of their own.
    reads_labels: ClassVar[bool] = False

    def load(self, images: Callable[[], TrainingImages]) -> Params:
        """The weights of `inception_network.features`; `images` are not asked for.

        Raises:
          UserError: there is no such file, or it holds something else.
        """
        return published_weights.read(
            self.weights,
            inception_weights.from_published,
            measure="FID",
            file=PUBLISHED,
            repository="mseitzer/pytorch-fid",
            place="on GitHub as mseitzer/pytorch-fid, release fid_weights",
        )

    def __call__(self, weights: Params, images: ImageBatch) -> Features:
        """Raises ValueError unless images have 3 channels, or 1: grey is shown to all three."""
        require_grey_or_colour(images)
        scaled = (resize(images) - 128) / 128
        x = jnp.broadcast_to(scaled, (*scaled.shape[:-1], 3))
        return inception_network.features(weights, x)


def resize(images: ImageBatch, side: int = SIDE) -> Float[Array, "b side side c"]:
    """Images of any sides, uint8, as float32 in [0, 255] with these sides, by the rule above.

    Columns first, then rows, as in the graph: the same to the last bit, unless a compiler fuses
    product and sum, which moves some values by a last place.
    """
    stretched = _interpolated(images.astype(jnp.float32), 2, side)
    return _interpolated(stretched, 1, side)


def _interpolated(x: Float[Array, "b _ _ c"], axis: int, after: int) -> Float[Array, "b _ _ c"]:
    # Positions in float32, as the graph computes them.
    at = np.arange(after, dtype=np.float32) * np.float32(x.shape[axis] / after)
    low = at.astype(np.int32)
    share = np.expand_dims(at - low.astype(np.float32), [a for a in range(4) if a != axis])
    start, end = (x.take(index, axis, mode="clip") for index in (low, low + 1))
    return start + (end - start) * share
