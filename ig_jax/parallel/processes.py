"""Cooperation of a job's processes: slices of work, gathered rows, barriers."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils


def process_slice(total: int) -> range:
    """Every n-th of 0..total-1, for work that n processes share without sending anything."""
    return range(jax.process_index(), total, jax.process_count())


def allgather_rows(rows: np.ndarray, total: int) -> np.ndarray:
    """The rows [total, ...] of which every process made its own (`mine`); all must ask."""
    if jax.process_count() == 1:
        return rows
    # Processes must send equally much.
    padded = np.zeros((-(-total // jax.process_count()), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    gathered = multihost_utils.process_allgather(padded)
    return gathered.swapaxes(0, 1).reshape(-1, *rows.shape[1:])[:total]


def from_process_0(answer: bool) -> bool:
    """The answer of process 0; all must ask."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def barrier(where: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
