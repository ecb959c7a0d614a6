"""Metrics on disk: metrics.jsonl (one object a line) and TensorBoard events.

Only process 0 writes. The TensorBoard writer needs no TensorFlow. A disk without room stops none of
it: what should be written waits for the next time, and that is said once.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from ig_jax import pytree
from ig_jax.errors import UserError
from ig_jax.io import files
from ig_jax.monitoring.console import room_or_not, say

METRICS_FILE = "metrics.jsonl"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without those that something damaged."""
    return [line for line in _lines(workdir / METRICS_FILE) if line is not None]


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """Every line, None where it is damaged; a last one that a kill cut short is left out."""
    if not path.exists():
        return []
    return [_metrics(line) for line in files.read_bytes(path).split(b"\n")[:-1]]


def _metrics(line: bytes) -> dict[str, Any] | None:
    """Parses a line; None if it is not a step and other numbers."""
    try:
        found = files.parse_json(line, METRICS_FILE)
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

    def hparams(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Settings by name, and the scalars by which TensorBoard's tab HPARAMS compares runs."""
        given = {name: value for name, value in values.items() if value is not None}
        numbers = bool | int | float
        plain = {n: v if isinstance(v, numbers) else str(v) for n, v in given.items()}
        parts = self._summary.hparams(plain, dict.fromkeys(metrics))
        self._file.add(b"".join(self._record(summary=part) for part in parts))

    def image(self, step: int, name: str, image: Any) -> None:
        """One uint8 image [h, w, c]."""
        summary = self._summary.image(name, image, dataformats="HWC")
        self._file.add(self._record(step=step, summary=summary))

    def close(self) -> None:
        self._file.close()


class MetricWriter:
    """Scalars by step. Lines later than `resumed_at` are dropped: those steps are run again."""

    def __init__(self, workdir: Path, *, resumed_at: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        lines = _lines(workdir / METRICS_FILE)
        kept = [m for m in lines if m is not None and m["step"] <= resumed_at]
        if None in lines:
            say(f"{workdir / METRICS_FILE}: {lines.count(None)} damaged lines are left out")
        files.write_text(workdir / METRICS_FILE, "".join(json.dumps(m) + "\n" for m in kept))
        self._lines = Appended(workdir / METRICS_FILE)
        self._events = Events(workdir / "tensorboard", resumed_at=resumed_at)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        if self._active:
            self._lines.add((json.dumps({"step": step, **values}) + "\n").encode())
            self._events.scalars(step, values)

    def settings(self, config: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The raw config of a run, as TensorBoard's hyper-parameters; `metrics` compare them."""
        if self._active:
            self._events.hparams(pytree.flatten(config), metrics)

    def images(self, step: int, name: str, image: Any) -> None:
        """One uint8 image [h, w, c]."""
        if self._active:
            self._events.image(step, name, image)

    def close(self) -> None:
        if self._active:
            self._lines.close()
            self._events.close()
