"""Log messages of libraries: silenced for the command line, which reports errors itself.

Orbax logs every error of its threads before it raises it here, where it becomes a sentence; the
coroutines that it drops then are each reported by asyncio, with a stack trace.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from absl import logging as absl_logging

from ig_jax.io import disk_errors

# What coroutines and threads raise when the loop or pool that they belong to is gone.
GONE = ("Event loop is closed", "cannot schedule new futures after")


@cache
def silence() -> None:
    """Lets libraries log nothing, and drops what a failing disk makes threads and coroutines say.

    What is raised is not touched, nor any other error that nobody caught.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("asyncio", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unless_of_disks(sys.unraisablehook)
    threading.excepthook = _unless_of_disks(threading.excepthook)


@contextmanager
def errors_only() -> Iterator[None]:
    """Keeps libraries from logging warnings inside, such as on opening a run only to read it."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(min(before, absl_logging.ERROR))
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def _unless_of_disks(hook: Any) -> Any:
    def heard(unraised: Any) -> None:
        error = unraised.exc_value
        gone = isinstance(error, RuntimeError) and str(error).startswith(GONE)
        if not gone and disk_errors.number(error) is None:
            hook(unraised)

    return heard
