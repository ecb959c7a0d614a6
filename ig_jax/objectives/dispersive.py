"""Dispersive loss: the tokens of different images are driven apart.

  L = log mean over all pairs i, j of exp(-d_ij / tau),   d_ij = mean over tokens and channels of
                                                                 (z_i - z_j)^2

z_i are the tokens of image i after one block; pairs with i = j are included. There are no positive
pairs, no head and no second pass. The loss depends on how many images are paired: those that one
device sees at a time, as published, or groups of `group_size` images, whatever the devices.

Source: arXiv 2506.09027 and its published code. Its SiT-B/2: weight 0.5, tau 0.5, a quarter of the
depth, 16 images a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ig_jax.bounds import unset
from ig_jax.errors import require_all
from ig_jax.objectives.base import Needs, NoisedBatch, Term
from ig_jax.types import NONE, Params, PerExample


@dataclass(frozen=True)
class Dispersive(Term):
    """The loss of an image is that of the images it is paired with."""

    depth: int  # the block, from 1, whose tokens are dispersed; published: a quarter of all
    tau: float = 0.5
    # Images that are paired with each other, neighbours in the batch; None: all on a device.
    # Parts of a batch (train.accumulation) pair others than the whole batch does.
    group_size: int | None = unset(0, None)

    def __post_init__(self):
        super().__post_init__()
        size = self.group_size
        rules = [
            ("tau", self.tau > 0, "must be above 0; published: 0.5"),
            ("group_size", size is None or size >= 2, "must be at least 2, or None for all"),
        ]
        require_all(self, rules)

    @property
    def needs(self) -> Needs:
        return Needs(taps=(self.depth,))

    def check_rows(self, rows: int) -> None:
        size = rows if self.group_size is None else self.group_size
        if size < 2:
            raise ValueError("pairs images, but a device has one at a time; use larger batches")
        if rows % size:
            raise ValueError(
                f"group_size = {size}: must divide the {rows} images that a device has at a time"
            )

    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        tokens = batch.out.features[self.depth]
        size = len(tokens) if self.group_size is None else self.group_size
        groups = tokens.reshape(len(tokens) // size, size, -1)
        return jnp.repeat(_dispersion(groups, self.tau), size)


def _dispersion(z: Float[Array, "k n m"], tau: float) -> Float[Array, "k"]:
    """The loss of each of k groups of n images."""
    # Distances do not see the mean, without which products of float32 lose fewer digits.
    z = z - jnp.mean(z, axis=1, keepdims=True)
    products = jnp.einsum("kim,kjm->kij", z, z, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.diagonal(products, axis1=1, axis2=2)
    distances = (squares[:, :, None] + squares[:, None, :] - 2 * products) / z.shape[2]
    pairs = jnp.log(z.shape[1] ** 2)
    return jax.scipy.special.logsumexp(-distances / tau, axis=(1, 2)) - pairs
