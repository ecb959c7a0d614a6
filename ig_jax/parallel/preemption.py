"""Stopping on request: SIGTERM (preemption, a scheduler's limit) and Ctrl-C become a question.

The loop asks before every program. With several processes, all must stop at the same step, whoever
was given: JAX's own notifier, which catches SIGTERM, agrees on one.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop, and it did: all is saved, and it can go on later.

    As with Ctrl-C, `except Exception` does not catch it: a script that runs several programs ends.
    """


class StopSignal:
    """Catches the first signal; a second one is obeyed.

    Signals come to the main thread only: in any other one, none are caught.
    """

    def __init__(self):
        self.received: str | None = None
        self._together = jax.process_count() > 1
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM belongs to JAX.
            for number in SIGNALS[1:] if self._together else SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self._restore()
        name = signal.Signals(number).name
        # Not through sys.stderr, which may be in the middle of a write.
        with suppress(OSError):
            os.write(2, f"\n{name}: stopping after this step; again to abort\n".encode())
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.received = name

    def before(self, step: int) -> bool:
        """Returns whether to stop before this step; all processes get the same answer."""
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM.name
        return self.received is not None

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None: not Python's, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
