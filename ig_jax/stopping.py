"""Stopping on request: SIGTERM (preemption, a scheduler's limit) and Ctrl-C become a question.

The loop asks before every program. With several processes, all must stop at the same step, whoever
was told: JAX's own notifier, which catches SIGTERM, agrees on one.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Catches the first signal; a second one is obeyed."""

    def __init__(self):
        self.received: str | None = None
        self._together = jax.process_count() > 1

    def __enter__(self) -> StopSignal:
        # With several processes SIGTERM belongs to JAX.
        mine = SIGNALS[1:] if self._together else SIGNALS
        self._previous = {number: signal.signal(number, self._note) for number in mine}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self._restore()
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.received = signal.Signals(number).name

    def before(self, step: int) -> bool:
        """Whether to stop before this step; all processes get the same answer."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM.name
        return self.received is not None

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
