"""Common parts of all optimizers: the leaves that they see, and clipping over them together."""

from __future__ import annotations

from collections.abc import Callable

import optax
from jaxtyping import Array

from ig_jax import pytree
from ig_jax.optim import matrix_axes
from ig_jax.types import Params, Scalar

# (name, leaf, fn) -> fn(leaf), where fn treats the matrices of a stack one by one: whoever has
# several devices can share them out.
Share = Callable[[str, Array, Callable[[Array], Array]], Array]


def alone(path: str, leaf: Array, fn: Callable[[Array], Array]) -> Array:
    """The `Share` of one device."""
    return fn(leaf)


def trained_only(
    optimizer: optax.GradientTransformation, clip_norm: float
) -> optax.GradientTransformation:
    """`optimizer` after clipping; fixed leaves get no update and count in no norm.

    Args:
      optimizer: sees the trained leaves only, however it groups them.
      clip_norm: bound on the global norm over all trained leaves; 0 is off.
    """
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []

    def labels(params: Params) -> Params:
        return pytree.map_named(
            lambda path, _: "fixed" if matrix_axes.is_fixed(path) else "trained", params
        )

    groups = {"trained": optax.chain(*clip, optimizer), "fixed": optax.set_to_zero()}
    return optax.partition(groups, labels)


def gradient_norm(grads: Params) -> Scalar:
    """Global norm over the trained leaves: what clipping compares with `clip_norm`."""
    named = pytree.flatten(grads).items()
    return optax.tree.norm({path: g for path, g in named if not matrix_axes.is_fixed(path)})
