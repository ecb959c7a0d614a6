"""Which axis of which leaf is split over which axes of the mesh: rules over names.

Parameters, optimizer state and averages follow one table: a leaf of any of them ends in the name of
the parameter it belongs to. Under `blocks` a leaf is a stack [depth, ...]; the depth is not split,
so that one block can be gathered at a time.

A leaf is split over `fsdp` and, where its length allows, over `data` too: with fsdp = 1 that is
ZeRO (arXiv 1910.02054): no device keeps more than its share of anything a step changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ig_jax import pytree
from ig_jax.errors import UserError
from ig_jax.parallel.mesh import DATA, FSDP, TENSOR, parts_of_batch
from ig_jax.types import Params

# End of a name -> the array axis (behind the depth; from the end if negative) that `fsdp` and
# `data` split, and the one that `tensor` splits. The first that matches wins. A product's inner
# axis is split where its other one is taken by the heads or the width of the MLP.
RULES: Mapping[str, tuple[int | None, int | None]] = {
    r"attn\.qkv\.kernel": (0, -2),
    r"attn\.qkv\.bias": (None, -2),
    r"attn\.proj\.kernel": (-1, 0),
    r"mlp\.(fc1|w12)\.kernel": (0, -1),
    r"mlp\.(fc1|w12)\.bias": (None, -1),
    r"mlp\.(fc2|w3)\.kernel": (-1, 0),
    r"(x_embedder\.proj\.kernel|embedding)": (-1, None),
    r"kernel": (0, None),
    r"(bias|scale|pos_embed)": (None, None),
}


@dataclass(frozen=True)
class Placed:
    """How one leaf lies on the mesh."""

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


def _rule(path: str) -> str | None:
    return next((rule for rule in RULES if re.search(rf"(^|\.){rule}$", path)), None)


def _axes(path: str, shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """The axes that FSDP (with DATA) and TENSOR split, counted from 0; None: none."""
    rule = _rule(path)
    if rule is None and len(shape) <= 1:
        return None, None  # counters, and what is too small to matter
    if rule is not None:
        stacked = int(pytree.is_stack(path))
        return tuple(
            None if axis is None else axis + (stacked if axis >= 0 else len(shape))
            for axis in RULES[rule]
        )
    raise UserError(
        f"no rule says how to split the parameter {path} over devices: add one to RULES in "
        "ig_jax/parallel/partitioning.py"
    )


def place(mesh: Mesh, path: str, shape: tuple[int, ...]) -> Placed:
    """How the leaf of this dotted name and shape lies on the mesh.

    Raises:
      UserError: no rule matches; `fsdp` or `tensor` does not divide the axis that they split.
    """
    split, tensor = _axes(path, shape)
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


def placements(mesh: Mesh, params: Params) -> dict[str, Placed]:
    """Dotted name -> placement of every parameter.

    Raises:
      UserError: as `place`; or a rule is never used, so that the names it was for have changed.
    """
    flat = pytree.flatten(params)
    unused = RULES.keys() - {_rule(path) for path in flat}
    if unused:
        raise UserError(
            f"the rule {sorted(unused)[0]!r} of RULES in ig_jax/parallel/partitioning.py matches "
            "no parameter of this network: mend or remove it"
        )
    return {path: place(mesh, path, leaf.shape) for path, leaf in flat.items()}


def shardings(mesh: Mesh, values: Any) -> Any:
    """A sharding for every leaf of a state, or of any part of one; leaves may be abstract."""
    return pytree.map_named(
        lambda path, leaf: NamedSharding(mesh, place(mesh, path, leaf.shape).spec(len(leaf.shape))),
        values,
    )


def abstract(mesh: Mesh, values: Any) -> Any:
    """Every leaf as a shape with the sharding it is to have."""
    return jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        values,
        shardings(mesh, values),
    )


def kept_whole(mesh: Mesh, params: Params) -> list[str]:
    """Names of the matrices that several devices along `data` do not share out."""
    if mesh.shape[DATA] == 1:
        return []
    found = placements(mesh, params)
    leaves = pytree.flatten(params)
    return [
        path
        for path, placed in found.items()
        if DATA not in placed.over and _axes(path, leaves[path].shape)[0] is not None
    ]
