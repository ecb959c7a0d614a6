"""Traces of some steps by JAX's profiler."""

from __future__ import annotations

from pathlib import Path

import jax

from ig_jax.monitoring import console


class Profile:
    """Traces some steps of a run with JAX's profiler, for TensorBoard and Perfetto."""

    def __init__(self, folder: Path, *, start: int, steps: int):
        """
        Args:
          folder: where the traces go.
          start: the first step that is traced.
          steps: how many are; 0: none.
        """
        self._folder, self._start = folder, start
        # The files of several processes in one folder could not be read together.
        self._stop = start + (steps if jax.process_index() == 0 else 0)
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
            console.say(
                f"traced steps are in {self._folder}; docs/profiling.md says how to read them"
            )
