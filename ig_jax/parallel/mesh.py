"""The mesh of devices, and arrays on their way between the host and it.

The mesh has three axes. Batches are split over `data` and `fsdp`; what a training step changes is
split over both as well (`placement.py`), and differs in when it is put together: what `data` splits
once a step, what `fsdp` splits a block at a time. `tensor` splits attention heads and the width of
the MLPs. Work that needs no other process (sampling, preparing) has a mesh of this process's own
devices, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)  # the axes that split a batch

_T = TypeVar("T")


def make_mesh(
    devices: Sequence[jax.Device] | None = None, sizes: tuple[int, int, int] | None = None
) -> Mesh:
    """All devices (or the given ones) as `sizes` = (data, fsdp, tensor); by default along `data`.

    The order follows the wiring where JAX knows it, with `tensor` between the nearest.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (len(devices), 1, 1) if sizes is None else sizes
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def local_mesh(mesh: Mesh) -> Mesh:
    """This process's devices of `mesh`, along `data`."""
    own = [d for d in mesh.devices.ravel() if d.process_index == jax.process_index()]
    return make_mesh(own)


def parts_of_batch(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits array axis `axis` over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def bytes_each(values: Any) -> int:
    """Bytes on each device of arrays, also of abstract ones, that know where they are."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(values)
    )


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Rows of a batch of `size` on this process's devices, ascending."""
    held = over_batch(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def to_global(
    rows: Mapping[str, np.ndarray], mesh: Mesh, size: int, axis: int = 0
) -> dict[str, jax.Array]:
    """The rows of `rows_here` along `axis` -> global arrays with `size` rows there."""
    sharding = over_batch(mesh, axis)

    def globally(array: np.ndarray) -> jax.Array:
        shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return {name: globally(array) for name, array in rows.items()}


def prefetch(begun: Iterator[_T]) -> Iterator[_T]:
    """Every item once the next one is begun: devices work while the host uses what they made."""
    for item, _ in pairwise(chain(begun, [None])):
        yield item


def to_host(arrays: Any) -> Any:
    """Arrays that this process holds all of as numpy, explicitly, to pass a transfer guard."""
    return jax.device_get(arrays)


def replicate_locally(mesh: Mesh, tree: Any) -> Any:
    """A tree of global arrays, however they are split, whole on each device of `own_mesh(mesh)`.

    All processes must call it.
    """
    gathered = jax.device_put(tree, replicated(mesh))
    own = local_mesh(mesh)
    return jax.tree.map(lambda x: _on(own, x), gathered)


def _on(own: Mesh, array: jax.Array) -> jax.Array:
    """The same replicated array on this process's devices, without a copy."""
    pieces = [shard.data for shard in array.addressable_shards]
    order = {piece.device: piece for piece in pieces}
    placed = [order[device] for device in own.devices.ravel()]
    return jax.make_array_from_single_device_arrays(array.shape, replicated(own), placed)
