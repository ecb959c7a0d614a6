"""Lines, progress bars and tables on the console, from process 0."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import tqdm

from ig_jax.io import disk_errors


@contextmanager
def _room_or(otherwise: Callable[[str], None]) -> Iterator[None]:
    """Does `otherwise`, with the reason, where what is written inside finds no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in disk_errors.FULL:
            raise
        otherwise(os.strerror(error.errno))


def _unsaid(why: str) -> None:
    """Does nothing: standard output may be a file on the full disk, so nothing can be reported."""


def say(text: str) -> None:
    """One line on standard output, from process 0."""
    if jax.process_index() == 0:
        # A file's name may hold bytes that are no text.
        text = text.encode(errors="backslashreplace").decode()
        with _room_or(_unsaid):
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def say_data(source: Any) -> None:
    """Prints the summary of a data source, where it has one; for programs that open it."""
    if hasattr(source, "summary"):
        say(f"data: {source.summary()}")


@cache
def _say_once(what: str, folder: Path, why: str) -> None:
    say(f"{what} cannot be written now: {why} ({disk_errors.room(folder)}); training goes on")


def room_or_not(what: str, folder: Path) -> AbstractContextManager[None]:
    """Lets writes to `folder` inside fail for want of space, and reports that once."""
    return _room_or(partial(_say_once, what, folder))


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


class Bar(tqdm.tqdm):
    """A progress bar that may fail to be shown."""

    def display(self, *args: Any, **kwargs: Any) -> None:
        with _room_or(_unsaid):
            super().display(*args, **kwargs)

    def close(self) -> None:
        with _room_or(_unsaid):
            super().close()


def progress(total: int, *, initial: int = 0, unit: str, what: str) -> tqdm.tqdm:
    """A bar with rate and time left; on a terminal it moves often, in a log file rarely."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return Bar(
        total=total,
        initial=initial,
        unit=unit,
        desc=what,
        mininterval=interval,
        dynamic_ncols=True,
        disable=jax.process_index() != 0,
    )


def leave_out(bar: tqdm.tqdm, seconds: float) -> None:
    """Keeps what just took `seconds` (compiling, drawing) out of the bar's rate and time left."""
    if not bar.disable:
        bar.start_t += seconds
        bar.last_print_t += seconds
