"""Roles of parameters for optimizers, by their names: fixed, a matrix, or neither.

Muon treats a parameter as a matrix (out, rest), in the layout of the published PyTorch models:
a Linear is (out, in) there and (in, out) here; a convolution OIHW there and HWIO here; the packed
q, k, v rows, the heads, and the two halves of a gated MLP are axes of their own here; a label table
is the same in both. Under `blocks` a leaf is a stack [depth, ...], which is a batch of matrices and
never one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from jaxtyping import Array, Float

from ig_jax import pytree

# `models/axes.py` says the same of a network; an optimizer also gets trees that are no module's.
# End of a name -> our axes that make the first dimension of the published shape, those that make
# the second, and those of any further ones, in order; the depth of a stack is not counted.
_AXES = {
    "attn.qkv.kernel": ((1, 2, 3), (0,), ()),
    "attn.proj.kernel": ((2,), (0, 1), ()),
    "mlp.w12.kernel": ((1, 2), (0,), ()),
    "x_embedder.proj.kernel": ((3,), (2,), (0, 1)),
    "kernel": ((1,), (0,), ()),
    "embedding": ((0,), (1,), ()),
}


@dataclass(frozen=True)
class Matrix:
    """A leaf's layout as a matrix (rows, cols) of the published model, or as a stack of them."""

    shape: tuple[int, ...]  # of the leaf
    order: tuple[int, ...]  # its axes as they are published, behind the depth of a stack
    batch: tuple[int, ...]  # (depth,) of a stack, else ()
    published: tuple[int, int]  # first two dimensions of the published shape, before flattening

    @property
    def rows(self) -> int:
        return self.published[0]

    @property
    def cols(self) -> int:
        return prod(self.shape) // prod(self.batch) // self.rows

    def flatten(self, leaf: Array) -> Float[Array, "*batch rows cols"]:
        """The leaf as (a batch of) matrices."""
        return leaf.transpose(self.order).reshape(*self.batch, self.rows, self.cols)

    def restore(self, matrices: Float[Array, "*batch rows cols"]) -> Array:
        """The inverse of `flatten`."""
        ordered = matrices.reshape([self.shape[axis] for axis in self.order])
        return ordered.transpose(np.argsort(self.order))


def matrix_of(path: str, shape: tuple[int, ...]) -> Matrix | None:
    """Layout of the leaf of this dotted name and shape; None for biases, scales and tables.

    Raises:
      ValueError: the name is that of a matrix, the number of axes is not.
    """
    end = next((end for end in _AXES if f".{path}".endswith(f".{end}")), None)
    if end is None:
        return None
    first, second, more = _AXES[end]
    stacked = int(pytree.is_stack(path))
    axes = (*first, *second, *more)
    if len(shape) != stacked + len(axes):
        raise ValueError(
            f"{path} has shape {shape}: a leaf called {end} has {stacked + len(axes)} axes here; "
            "add what it is to _AXES in optim/matrix_axes.py"
        )
    sizes = shape[stacked:]
    return Matrix(
        shape=tuple(shape),
        order=(*range(stacked), *(stacked + axis for axis in axes)),
        batch=tuple(shape[:stacked]),
        published=(prod(sizes[a] for a in first), prod(sizes[a] for a in second)),
    )


def is_fixed(path: str) -> bool:
    """True for leaves that live among the parameters but are never trained: position tables.

    They travel with the parameters because published checkpoints carry tables of their own. The
    published LightningDiT trainer hands its table to Muon, whose weight decay shrinks it step by
    step although it has no gradient; that is an accident, and not done here.
    """
    return path.split(".")[-1] == "pos_embed"
