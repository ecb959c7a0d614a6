"""One mesh, and how arrays are placed on it.

For now the mesh has a single axis, `data`: batches are split over it, everything else is
replicated. Host arrays become global ones here and nowhere else, so that one process or many makes
no difference to the programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or the given ones) along `data`."""
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits array axis `axis` over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def to_global(rows: Mapping[str, np.ndarray], mesh: Mesh, axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows along `axis` -> global arrays over all processes' devices."""
    sharding = over_batch(mesh, axis)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in rows.items()
    }


def to_host(array: jax.Array) -> Any:
    """A global array as numpy, explicitly, so that it passes a transfer guard."""
    return jax.device_get(array)
