"""Images through a feature space, on all devices of this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ig_jax.errors import UserError
from ig_jax.io.row_store import Row
from ig_jax.metrics.feature_space import FeatureSpace
from ig_jax.parallel.mesh import BATCH, replicated, to_global, to_host
from ig_jax.types import Params

Rows = Mapping[str, np.ndarray]  # what is kept of each image, by name, each [n, ...]


def concatenate_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of several parts, one after the other; at least one part."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class FeatureExtractor:
    """Looks at images, a batch of one size at a time: one compiled program an image size."""

    def __init__(
        self, space: FeatureSpace, weights: Params, mesh: Mesh, batch_size: int, section: str
    ):
        """
        Args:
          space: from images to features.
          weights: of `space`.
          mesh: of this process's own devices.
          batch_size: images looked at together, divisible by the devices.
          section: of the config that names the space, for the messages.
        """
        self.space, self._mesh, self._size, self.section = space, mesh, batch_size, section
        self._weights = jax.device_put(weights, replicated(mesh))
        whole, rows = PartitionSpec(), PartitionSpec(BATCH)
        # No device needs another's images.
        each = jax.shard_map(space, mesh=mesh, in_specs=(whole, rows), out_specs=rows)
        self._program = jax.jit(each)

    def __call__(self, images: np.ndarray) -> Rows:
        """Features of uint8 images [n, h, w, c], n at least 1: {'pool': [n, d], ...}.

        Raises:
          UserError: one of them is NaN or infinity.
        """
        parts = []
        for start in range(0, len(images), self._size):
            taken = np.asarray(images[start : start + self._size])
            padded = taken[np.arange(self._size) % len(taken)]
            batch = to_global({"images": padded}, self._mesh, self._size)
            features = self._program(self._weights, batch["images"])
            host = {n: x for n, x in to_host(features)._asdict().items() if x is not None}
            for name, x in host.items():
                if not np.isfinite(x).all():
                    raise UserError(
                        f"{self.section}: {name!r} of some image is NaN or infinity; its "
                        "weights are damaged, take the published file"
                    )
            parts.append({name: x[: len(taken)] for name, x in host.items()})
        return concatenate_rows(parts)

    def rows(self, shape: tuple[int, ...]) -> dict[str, Row]:
        """Shapes and dtypes of the features of an image [h, w, c]."""
        batch = jax.ShapeDtypeStruct((self._size, *shape), np.uint8)
        features = jax.eval_shape(self._program, self._weights, batch)._asdict()
        return {n: Row(x.shape[1:], x.dtype) for n, x in features.items() if x is not None}
