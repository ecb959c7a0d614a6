"""Partitioning of parameters over the mesh, by rules over the names of their axes.

Parameters, optimizer state and averages follow one table: a leaf of any of them is split as the
parameter it belongs to, whose axes are named where it is created (`models/axes.py`). Under `blocks`
a leaf is a stack [depth, ...]; the depth is not split, so that one block can be gathered at a time.

A leaf is split over `fsdp` and, where its length allows, over `data` too: with fsdp = 1 that is
ZeRO (arXiv 1910.02054): no device keeps more than its share of anything a step changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ig_jax import pytree
from ig_jax.errors import UserError
from ig_jax.models import axes as logical
from ig_jax.models.axes import Axes
from ig_jax.parallel.mesh import DATA, FSDP, TENSOR, parts_of_batch
from ig_jax.types import Params

# Name of an axis -> axis of the mesh that splits it. `fsdp` and `data` split the first such axis of
# a matrix, and no bias, scale or table of positions, which are small; `tensor` splits both.
RULES: Mapping[str, str] = {
    logical.EMBED: FSDP,
    logical.CONDITION: FSDP,
    logical.TIME_FEATURES: FSDP,
    logical.HEADS: TENSOR,
    logical.MLP: TENSOR,
}


@dataclass(frozen=True)
class Placed:
    """Placement of one leaf on the mesh."""

    axis: int | None  # of the array, split over `over`
    over: tuple[str, ...]  # of FSDP and DATA, in this order: shards of `fsdp` are cut into `data`
    tensor: int | None  # axis of the array, split over TENSOR

    def spec(self, rank: int, *, tensor: bool = True) -> PartitionSpec:
        parts: list[Any] = [None] * rank
        if self.over:
            parts[self.axis] = self.over
        if tensor and self.tensor is not None:
            parts[self.tensor] = TENSOR
        return PartitionSpec(*parts)


def _axes(axes: Axes, path: str, shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """The axes that FSDP (with DATA) and TENSOR split, counted from 0; None: none."""
    names = logical.names_of(axes, path)
    if names is None and len(shape) <= 1:
        return None, None  # counters, and what is too small to matter
    if names is None:
        raise UserError(
            f"no rule says how to split the parameter {path} over devices: name its axes where it "
            "is created (ig_jax/models/axes.py), by which RULES in "
            "ig_jax/parallel/partitioning.py split it"
        )

    def first(part: str) -> int | None:
        return next((axis for axis, name in enumerate(names) if RULES.get(name) == part), None)

    return first(FSDP) if logical.is_matrix(names) else None, first(TENSOR)


def place(mesh: Mesh, axes: Axes, path: str, shape: tuple[int, ...]) -> Placed:
    """Placement of the leaf of this dotted name and shape.

    Args:
      axes: names of the axes of every parameter, of which `path` may be one or end in one.

    Raises:
      UserError: its axes have no names; `fsdp` or `tensor` does not divide the axis it splits.
    """
    split, tensor = _axes(axes, path, shape)
    for axis, name in ((split, FSDP), (tensor, TENSOR)):
        if axis is not None and shape[axis] % mesh.shape[name]:
            raise UserError(
                f"mesh.{name} = {mesh.shape[name]}: does not divide axis {axis} of {path} "
                f"{list(shape)}; choose a divisor of {shape[axis]}"
            )
    over: tuple[str, ...] = ()
    if split is not None:
        # Unlike `fsdp`, `data` was not chosen for the sake of this leaf: it may stay whole.
        divisible = shape[split] % parts_of_batch(mesh) == 0
        over = tuple(a for a in (FSDP, *[DATA] * divisible) if mesh.shape[a] > 1)
    return Placed(split if over else None, over, tensor if mesh.shape[TENSOR] > 1 else None)


def placements(mesh: Mesh, axes: Axes, params: Params) -> dict[str, Placed]:
    """Dotted name -> placement of every parameter.

    Raises:
      UserError: as `place`; or a rule is never used, so that the axes it was for have other names.
    """
    flat = pytree.flatten(params)
    unused = RULES.keys() - {name for path in flat for name in logical.names_of(axes, path) or ()}
    if unused:
        raise UserError(
            f"the rule {sorted(unused)[0]!r} of RULES in ig_jax/parallel/partitioning.py matches "
            "no parameter of this network: correct or remove it"
        )
    return {path: place(mesh, axes, path, leaf.shape) for path, leaf in flat.items()}


def shardings(mesh: Mesh, axes: Axes, values: Any) -> Any:
    """A sharding for every leaf of a state, or of any part of one; leaves may be abstract."""

    def of_leaf(path: str, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, place(mesh, axes, path, leaf.shape).spec(len(leaf.shape)))

    return pytree.map_named(of_leaf, values)


def abstract(mesh: Mesh, axes: Axes, values: Any) -> Any:
    """Every leaf as a shape with the sharding it is to have."""
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        values,
        shardings(mesh, axes, values),
    )


def kept_whole(mesh: Mesh, axes: Axes, params: Params) -> list[str]:
    """Names of the matrices that several devices along `data` do not share out."""
    if mesh.shape[DATA] == 1:
        return []
    placed_by_path = placements(mesh, axes, params)
    leaves = pytree.flatten(params)
    return [
        path
        for path, placed in placed_by_path.items()
        if DATA not in placed.over and _axes(axes, path, leaves[path].shape)[0] is not None
    ]
