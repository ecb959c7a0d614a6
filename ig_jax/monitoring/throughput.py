"""Throughput of a training loop, and means of its metrics between two lines of metrics.jsonl."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ig_jax.errors import UserError
from ig_jax.monitoring import peak_flops
from ig_jax.objectives.metrics import Mean, add_steps, logged

GIB = 2**30
SKIPPED = "skipped_updates"  # 1 for a step whose update was not made


class NonFiniteLoss(UserError):
    """The loss stopped being a number; the last good checkpoint is kept."""

    def __init__(self, loss: float, step: int):
        self.loss, self.step = loss, step
        super().__init__(
            f"the loss is {loss} at step {step}: stopped; lower optim.learning_rate and go on from "
            "the last good checkpoint, or train anew in another --workdir; --mode=replay computes "
            "this step again, looking at every operation"
        )


def memory_gib() -> float:
    """In use on this process's fullest device; where devices do not tell, by the process."""
    usage = [stats for d in jax.local_devices() if (stats := d.memory_stats())]
    if usage:
        return max(stats["bytes_in_use"] for stats in usage) / GIB
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / GIB
    except OSError:  # not Linux: the most it ever used
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def of_every_process(values: Mapping[str, float]) -> dict[str, float]:
    """{'<name>/process_0': its value there, ...} where there are several; all must ask."""
    if jax.process_count() == 1:
        return {}
    rows = multihost_utils.process_allgather(np.array(list(values.values()), np.float32))
    return {
        f"{name}/process_{process}": float(row[i])
        for process, row in enumerate(rows)
        for i, name in enumerate(values)
    }


class Rates:
    """Model FLOP/s of a training step, and their share of a device's peak."""

    def __init__(self, flops_per_device: float, device_kind: str, *, peak_tflops: float | None):
        """
        Args:
          flops_per_device: of one step, on each device.
          device_kind: as JAX names it.
          peak_tflops: of one device in dense bfloat16; None: the published one, where it is known.
        """
        self._flops = flops_per_device
        self._peak = peak_tflops * 1e12 if peak_tflops else peak_flops.peak_flops(device_kind)

    def of(self, seconds_per_step: float) -> dict[str, float]:
        """{'model_tflops_per_device', 'mfu'}; the latter where the peak is known."""
        rate = self._flops / seconds_per_step
        rates = {"model_tflops_per_device": rate / 1e12}
        return rates | ({"mfu": rate / self._peak} if self._peak else {})


class Window:
    """Metrics and seconds since the last line."""

    def __init__(self):
        self._since = time.perf_counter()
        self._steps = 0
        self._sums: dict[str, Mean] = {}
        self._seconds = {"data": 0.0, "checkpoint": 0.0, "left_out": 0.0}

    def leave_out(self, seconds: float) -> None:
        """Time that belongs to no step: compiling, drawing."""
        self._seconds["left_out"] += seconds

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Counts the time of its body as waiting for 'data', or saving a 'checkpoint'."""
        started = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - started

    def add(self, first_step: int, metrics: Mapping[str, Mean]) -> None:
        """Metrics [k] of steps first_step + 1, ...; raises at the first loss that is not finite."""
        for offset, loss in enumerate(metrics["loss"].value.tolist()):
            if not math.isfinite(loss):
                raise NonFiniteLoss(loss, first_step + offset + 1)
        sums = add_steps(metrics)
        self._sums = jax.tree.map(np.add, self._sums, sums) if self._sums else sums
        self._steps += len(metrics["loss"].total)

    def summary(self, batch_size: int, rates: Rates) -> dict[str, Any]:
        """Means over the steps, and how fast they went, here and in every process."""
        steps = self._steps
        passed = time.perf_counter() - self._since - self._seconds["left_out"]
        training = passed - self._seconds["checkpoint"]
        speed = {
            "steps_per_second": steps / passed,
            "images_per_second": steps * batch_size / passed,
            **rates.of(training / steps),
        }
        here = {
            "seconds/step": training / steps,
            "seconds/data": self._seconds["data"] / steps,
            "seconds/checkpoint": self._seconds["checkpoint"],
            "memory_gib": memory_gib(),
        }
        means = logged(self._sums)
        if SKIPPED in means:
            means[SKIPPED] = int(self._sums[SKIPPED].total)
        return means | speed | here | of_every_process(here)
