"""From a source to an endless stream of batches: shuffled, sharded by process, exactly resumable.

Only indices travel through the pipeline; a batch is gathered from the source in one go at its end.
Batches are cut from the global order before each process takes its rows, so that the global batch
does not depend on the number of processes. A run's place in the order is the number of examples it
has seen, so that batches of another size go on from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from ig_jax.errors import UserError
from ig_jax.types import Source


def batches(
    source: Source,
    batch_size: int,
    seed: int,
    *,
    start: int = 0,
    rows: np.ndarray | None = None,
    threads: int = 2,
) -> grain.DatasetIterator:
    """Some rows of every global batch, from example number `start` of the order on.

    Args:
      source: where examples come from.
      batch_size: global; above the size of the source a batch holds examples more than once.
      seed: with the epoch, decides the order.
      start: examples to skip without reading them: those that earlier batches held, of whatever
        size they were.
      rows: which rows of a batch, those of this process; None: all.
      threads: that gather ahead.

    Raises:
      UserError: the source holds no examples.
    """
    if not len(source):
        raise UserError("data.source: holds no examples")
    taken = slice(None) if rows is None else rows
    skipped, offset = divmod(start, batch_size)
    order = _order(source, batch_size, seed, offset)
    read = order.map(lambda index: source.batch(index[taken]))
    # The default options would read hundreds of whole batches ahead.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(read.to_iter_dataset(options))
    iterator.set_state(_state_at(iterator, skipped))
    return iterator


def indices(source: Source, batch_size: int, seed: int, start: int) -> np.ndarray:
    """Indices [batch_size] of the examples in the global batch that `start` examples precede."""
    skipped, offset = divmod(start, batch_size)
    return _order(source, batch_size, seed, offset)[skipped]


def _order(source: Source, batch_size: int, seed: int, offset: int) -> grain.MapDataset:
    """Batch number -> indices of its examples, the first `offset` in no batch.

    Every epoch has an order of its own.
    """
    shuffled = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    return shuffled[offset:].batch(batch_size)


def _state_at(iterator: Iterator, start: int) -> dict[str, Any]:
    return {**iterator.get_state(), "next_index": start}
