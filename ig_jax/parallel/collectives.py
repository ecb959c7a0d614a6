"""Communication between devices in a training step; all of it is written out here.

A step runs on every device's own rows of the batch (`jax.shard_map`). Parameters arrive split as
`partitioning.py` says. What only `data` splits is put together once, at the beginning of a forward
pass; what `fsdp` splits, one block at a time inside the scan over the blocks, again in the backward
pass. The gradient of putting together is sum and split: so gradients leave as parameters came, and
the optimizer works on every device's own shards. Blocks' matrices travel in the type that computes
with them; sums of gradients are float32.

`tensor` is left to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from ig_jax import pytree
from ig_jax.models.axes import Axes
from ig_jax.optim.train_state import HEADS_OF_TERMS
from ig_jax.parallel.mesh import BATCH, FSDP, parts_of_batch
from ig_jax.parallel.partitioning import Placed, place, placements
from ig_jax.types import NONE, BatchRows, OneDevice, Params


def _together(
    x: jax.Array, axis: int, over: tuple[str, ...], dtype: Any, *, of_blocks: bool = False
) -> jax.Array:
    """Shards -> the whole along `axis`, as `dtype`; the gradient is summed in float32 and split."""

    def gather(x: jax.Array) -> jax.Array:
        return lax.all_gather(x.astype(dtype), over, axis=axis, tiled=True)

    def forward(x: jax.Array) -> tuple[jax.Array, None]:
        return gather(x), None

    def backward(_: None, g: jax.Array) -> tuple[jax.Array]:
        g = g.astype(jnp.float32)
        g = _last_axis_first(g) if of_blocks and axis == g.ndim - 1 else g
        return (lax.psum_scatter(g, over, scatter_dimension=axis, tiled=True),)

    gathered = jax.custom_vjp(gather)
    gathered.defvjp(forward, backward)
    return gathered(x)


def _last_axis_first(x: jax.Array) -> jax.Array:
    """x, which lies in memory as if its last axis were its first.

    XLA for TPUs sums and splits along the last axis at once only then, as a device's part is one
    piece of memory. Else it sums the whole on every device, which sends twice as much, and cuts.
    For the matrices of blocks: with some of the others libtpu 0.0.50 makes no program then.
    """
    if jax.default_backend() != "tpu":
        return x
    last = x.ndim - 1
    return with_layout_constraint(x, Layout(major_to_minor=(last, *range(last))))


def _type_of(path: str, leaf: jax.Array, dtype: Any) -> Any:
    matrix = path.startswith("blocks.") and path.endswith("kernel")
    return dtype if matrix else leaf.dtype


def as_computed(params: Params, dtype: Any) -> Params:
    """The blocks' matrices as `dtype`, in which they are used: the same predictions.

    Every layer would convert its matrix itself, in every evaluation.
    """
    return pytree.map_named(lambda path, x: x.astype(_type_of(path, x, dtype)), params)


@dataclass(frozen=True)
class ShardGather:
    """Puts one network's parameters together, inside a program of `over_devices`."""

    placed: Mapping[str, Placed]
    dtype: Any  # in which the blocks' matrices are used

    def once(self, params: Params) -> Params:
        """All that a pass needs whole from its beginning: everything but what FSDP splits of the
        blocks. Their matrices are converted here, once, and so are stacked gradients, back."""

        def gather(path: str, leaf: jax.Array) -> jax.Array:
            placed, dtype = self.placed[path], _type_of(path, leaf, self.dtype)
            over = placed.over
            of_blocks = path.startswith("blocks.")
            if FSDP in over and of_blocks:  # put together, and turned, in `block`
                over, dtype = tuple(a for a in over if a != FSDP), leaf.dtype
            if not over:
                return leaf.astype(dtype)
            return _together(leaf, placed.axis, over, dtype, of_blocks=of_blocks)

        return pytree.map_named(gather, params)

    def block(self, params: Params) -> Params:
        """One block's parameters, a slice of those that `once` returned."""

        def gather(path: str, leaf: jax.Array) -> jax.Array:
            placed = self.placed[f"blocks.{path}"]
            if FSDP not in placed.over:
                return leaf
            dtype = _type_of(f"blocks.{path}", leaf, self.dtype)
            axis = placed.axis - 1  # no depth in a slice
            return _together(leaf, axis, (FSDP,), dtype, of_blocks=True)

        return pytree.map_named(gather, params)


def gather(mesh: Mesh, axes: Axes, params: Params, dtype: Any) -> ShardGather:
    """For a network with these parameters, which may be abstract, and names of their axes."""
    return ShardGather(placements(mesh, axes, params), dtype)


def gather_terms(mesh: Mesh, axes: Axes, terms: Params) -> ShardGather:
    """For the heads of loss terms, which may be abstract; each is used whole, in its own type."""
    placed = {
        path: place(mesh, axes, f"{HEADS_OF_TERMS}.{path}", leaf.shape)
        for path, leaf in pytree.flatten(terms).items()
    }
    return ShardGather(placed, jnp.float32)


@dataclass(frozen=True)
class RowsOverDevices:
    """All rows of a batch inside a program of `over_devices`; a `BatchRows`."""

    devices: tuple[str, ...]  # axes of the mesh that split the batch, into more than one part

    def mean(self, x: jax.Array) -> jax.Array:
        return lax.pmean(jnp.mean(x, axis=0), self.devices)

    def all(self, x: jax.Array) -> jax.Array:
        return lax.all_gather(x, self.devices, axis=0, tiled=True)


def batch_rows(mesh: Mesh) -> BatchRows:
    """Of a batch over `mesh`."""
    devices = _splitting_batch(mesh)
    return RowsOverDevices(devices) if devices else OneDevice()


def _splitting_batch(mesh: Mesh) -> tuple[str, ...]:
    """The axes that split a batch into more than one part."""
    return tuple(axis for axis in BATCH if mesh.shape[axis] > 1)


def over_devices(
    gradients: Callable[..., tuple[Params, Mapping[str, Any]]],
    mesh: Mesh,
    axes: Axes,
) -> Callable[..., tuple[Params, Mapping[str, Any]]]:
    """`gradients(params, batch, teacher, step, frozen)` of a mean over rows, on own rows each.

    Args:
      gradients: what it returns for a part of the rows: gradients of the mean, and metrics, which
        add up.
      mesh: over which the batch is split, and parameters are placed.
      axes: names of the parameters' axes.

    Returns:
      A function of global arrays, for use inside `jit`; its gradients are placed as parameters are.
    """
    parts = parts_of_batch(mesh)
    devices = _splitting_batch(mesh)
    if not devices:
        return gradients

    def run(
        params: Params,
        batch: Any,
        teacher: Params,
        step: jax.Array | int = 0,
        frozen: Params = NONE,
    ) -> tuple[Params, Mapping[str, Any]]:
        frozen = dict(frozen)  # a pytree, which a read-only {} is not
        placed = placements(mesh, axes, {**frozen, **params})

        def reduce(path: str, grad: jax.Array) -> jax.Array:
            """Sums the gradients that gathering has not summed yet."""
            over = tuple(axis for axis in devices if axis not in placed[path].over)
            return (lax.psum(grad, over) if over else grad) / parts

        def each(*local: Any) -> tuple[Params, Mapping[str, Any]]:
            grads, metrics = gradients(*local)
            return pytree.map_named(reduce, grads), lax.psum(metrics, devices)

        def specs(tree: Params) -> Any:
            return pytree.map_named(lambda p, x: placed[p].spec(x.ndim, tensor=False), tree)

        split, whole = specs(params), PartitionSpec()
        mapped = jax.shard_map(
            each,
            mesh=mesh,
            in_specs=(split, PartitionSpec(devices), specs(teacher), whole, specs(frozen)),
            out_specs=(split, whole),
            axis_names=set(devices),
            check_vma=False,  # the sums over devices are ours
        )
        return mapped(params, batch, teacher, jnp.asarray(step), frozen)

    return run


def share_out(mesh: Mesh, axes: Axes) -> Callable[[str, jax.Array, Callable], jax.Array]:
    """Applies a function to whole matrices without doing all of them on each device.

    Returns:
      `apply(path, leaf, fn)`: `fn(leaf)` for a leaf of this name, where `fn` treats a stack
      [depth, ...] one by one. Each device gets some of the stack's matrices whole, and sends back
      everybody's shards of the result. A matrix outside a stack is done on each device.
    """

    def apply(path: str, leaf: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
        placed = place(mesh, axes, path, leaf.shape)
        if not placed.over:
            return fn(leaf)
        spec = placed.spec(leaf.ndim, tensor=False)
        each = _by_depth if pytree.is_stack(path) else _everywhere
        return jax.shard_map(
            lambda shard: each(shard, placed, fn),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            axis_names=set(placed.over),
            check_vma=False,
        )(leaf)

    return apply


def _by_depth(shard: jax.Array, placed: Placed, fn: Callable) -> jax.Array:
    """[depth, ... / n ...] -> [depth / n, ...], fn, and back; zeros fill up the depth."""
    depth, parts = shard.shape[0], lax.axis_size(placed.over)
    missing = -depth % parts
    filled = jnp.pad(shard, [(0, missing)] + [(0, 0)] * (shard.ndim - 1))
    matrices = lax.all_to_all(filled, placed.over, 0, placed.axis, tiled=True)
    return lax.all_to_all(fn(matrices), placed.over, placed.axis, 0, tiled=True)[:depth]


def _everywhere(shard: jax.Array, placed: Placed, fn: Callable) -> jax.Array:
    whole = fn(lax.all_gather(shard, placed.over, axis=placed.axis, tiled=True))
    size = shard.shape[placed.axis]
    start = lax.axis_index(placed.over) * size
    return lax.dynamic_slice_in_dim(whole, start, size, placed.axis)
