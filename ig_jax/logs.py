"""What a run tells: a progress bar, metrics.jsonl (one object a line) and TensorBoard events.

Only process 0 writes. The TensorBoard writer needs no TensorFlow. A disk without room stops none of
it: what should be written waits for the next time, and that is said once.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import tqdm

from ig_jax import storage
from ig_jax.errors import UserError
from ig_jax.formats import files

METRICS = "metrics.jsonl"


@contextmanager
def _room_or(otherwise: Callable[[str], None]) -> Iterator[None]:
    """Does `otherwise`, with the reason, where what is written inside finds no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in storage.FULL:
            raise
        otherwise(os.strerror(error.errno))


def _unsaid(why: str) -> None:
    """What is said itself often goes to a file: if that has no room, nothing can be told."""


def say(text: str) -> None:
    """One line on standard output, from process 0."""
    if jax.process_index() == 0:
        # A file's name may hold bytes that are no text.
        text = text.encode(errors="backslashreplace").decode()
        with _room_or(_unsaid):
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def say_data(source: Any) -> None:
    """What a source of data found, where it can tell; for programs that open it."""
    if hasattr(source, "summary"):
        say(f"data: {source.summary()}")


@cache
def _say_once(what: str, folder: Path, why: str) -> None:
    say(f"{what} cannot be written now: {why} ({storage.room(folder)}); training goes on")


def room_or_not(what: str, folder: Path) -> AbstractContextManager[None]:
    """What is written inside, in `folder`, may fail for want of space: that is said once."""
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


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without those that something damaged."""
    return [line for line in _lines(workdir / METRICS) if line is not None]


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """Every line, None where it is damaged; a last one that a kill cut short is left out."""
    if not path.exists():
        return []
    return [_metrics(line) for line in files.read_bytes(path).split(b"\n")[:-1]]


def _metrics(line: bytes) -> dict[str, Any] | None:
    """What a line tells; None if it is not a step and other numbers."""
    try:
        found = files.parse_json(line, METRICS)
    except UserError:
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int or found["step"] < 0:
        return None
    return found if all(type(value) in (int, float) for value in found.values()) else None


class Appended:
    """A file that grows by whole pieces; those that there is no room for wait for the next."""

    def __init__(self, path: Path):
        self._path, self._waiting = path, b""

    def add(self, piece: bytes) -> None:
        self._waiting += piece
        if not self._waiting:
            return
        end = self._path.stat().st_size if self._path.exists() else 0
        with room_or_not(self._path.name, self._path.parent):
            try:
                with open(self._path, "ab") as file:
                    file.write(self._waiting)
            except OSError:
                with suppress(OSError):  # what cannot be written to was not changed
                    os.truncate(self._path, end)
                raise
            self._waiting = b""

    def close(self) -> None:
        """A last attempt to write what waits."""
        self.add(b"")


class Events:
    """A file of TensorBoard events.

    tensorboardX has a writer, whose thread dies on a full disk; the next events then wait for it
    for ever. Here its records are appended by the caller.
    """

    def __init__(self, folder: Path, *, resumed_at: int):
        # Imported here: it takes half a second that only training need pay.
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._summary = event_pb2.Event, summary
        self._checksum = record_writer.masked_crc32c
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._file = Appended(folder / name)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # TensorBoard then forgets what it knew of this step and later ones.
        self._file.add(
            self._record(file_version="brain.Event:2")
            + self._record(step=resumed_at + 1, session_log=start)
        )

    def _record(self, **content: Any) -> bytes:
        """An event as the file holds it: its length and itself, a checksum behind each."""
        data = self._event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", self._checksum(part)) for part in (length, data))
        return b"".join(x for pair in zip((length, data), sums, strict=True) for x in pair)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        scalar = self._summary.scalar
        self._file.add(
            b"".join(self._record(step=step, summary=scalar(n, v)) for n, v in values.items())
        )

    def image(self, step: int, name: str, picture: Any) -> None:
        """One uint8 picture [h, w, c]."""
        summary = self._summary.image(name, picture, dataformats="HWC")
        self._file.add(self._record(step=step, summary=summary))

    def close(self) -> None:
        self._file.close()


class MetricWriter:
    """Scalars by step. Lines later than `resumed_at` are dropped: those steps are run again."""

    def __init__(self, workdir: Path, *, resumed_at: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        lines = _lines(workdir / METRICS)
        kept = [m for m in lines if m is not None and m["step"] <= resumed_at]
        if None in lines:
            say(f"{workdir / METRICS}: {lines.count(None)} damaged lines are left out")
        files.write_text(workdir / METRICS, "".join(json.dumps(m) + "\n" for m in kept))
        self._lines = Appended(workdir / METRICS)
        self._events = Events(workdir / "tensorboard", resumed_at=resumed_at)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        if self._active:
            self._lines.add((json.dumps({"step": step, **values}) + "\n").encode())
            self._events.scalars(step, values)

    def images(self, step: int, name: str, picture: Any) -> None:
        """One uint8 picture [h, w, c]."""
        if self._active:
            self._events.image(step, name, picture)

    def close(self) -> None:
        if self._active:
            self._lines.close()
            self._events.close()
