"""What a training loop measures of itself between two lines of metrics.jsonl."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ig_jax import chips, flops, logs
from ig_jax.build import Experiment
from ig_jax.errors import UserError
from ig_jax.objectives.base import BY_TIME, mean_by_time
from ig_jax.settings import ProfileSettings

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
    told = [stats for d in jax.local_devices() if (stats := d.memory_stats())]
    if told:
        return max(stats["bytes_in_use"] for stats in told) / GIB
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
    """Model FLOP/s of a step of this experiment, and their share of what the devices can."""

    def __init__(self, exp: Experiment):
        size = exp.config.train.batch_size
        self._flops = flops.train_step(exp.net, exp.abstract_params, size) / exp.mesh.size
        kind = exp.mesh.devices.flat[0].device_kind
        told = exp.config.log.peak_tflops
        self._peak = told * 1e12 if told else chips.peak_flops(kind)

    def of(self, seconds_per_step: float) -> dict[str, float]:
        """{'model_tflops_per_device', 'mfu'}; the latter where the peak is known."""
        rate = self._flops / seconds_per_step
        found = {"model_tflops_per_device": rate / 1e12}
        return found | ({"mfu": rate / self._peak} if self._peak else {})


class Profile:
    """Traces some steps of a run with JAX's profiler, for TensorBoard and Perfetto."""

    def __init__(self, settings: ProfileSettings, folder: Path, step: int):
        self._folder = folder
        self._start = step + settings.start
        # The files of several processes in one folder could not be read together.
        self._stop = self._start + (settings.steps if jax.process_index() == 0 else 0)
        self._tracing = False

    def before(self, step: int) -> None:
        """Begins or ends before this step, or at the next step that begins a program."""
        if not self._tracing and self._start <= step < self._stop:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a compilation would fill the trace with its calls
            jax.profiler.start_trace(
                str(self._folder), create_perfetto_trace=True, profiler_options=options
            )
            self._tracing = True
        elif self._tracing and step >= self._stop:
            self.close()

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            logs.say(f"traced steps are in {self._folder}; docs/profiling.md says how to read them")


class Window:
    """Metrics and seconds since the last line."""

    def __init__(self):
        self._since = time.perf_counter()
        self._values: dict[str, list[Any]] = defaultdict(list)
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

    def add(self, first_step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Metrics [k] of steps first_step + 1, ...; raises at the first loss that is not finite."""
        for offset, loss in enumerate(metrics["loss"].tolist()):
            if not math.isfinite(loss):
                raise NonFiniteLoss(loss, first_step + offset + 1)
        for name, values in metrics.items():
            self._values[name].extend(values.tolist())

    def summary(self, batch_size: int, rates: Rates) -> dict[str, Any]:
        """Means over the steps, and how fast they went, here and in every process."""
        steps = len(self._values["loss"])
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
        sums = {n: np.sum(v, axis=0) for n, v in self._values.items() if n.startswith(BY_TIME)}
        means = {n: float(np.mean(v)) for n, v in self._values.items() if n not in sums}
        if SKIPPED in means:
            means[SKIPPED] = int(np.sum(self._values[SKIPPED]))
        return means | speed | here | of_every_process(here) | mean_by_time(sums)
