"""What a run tells: a progress bar, metrics.jsonl (one object a line) and TensorBoard events.

Only process 0 writes. The TensorBoard writer needs no TensorFlow.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tqdm

METRICS = "metrics.jsonl"


def say(text: str) -> None:
    """One line on standard output, from process 0."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def progress(total: int, *, initial: int = 0, unit: str, what: str) -> tqdm.tqdm:
    """A bar with rate and time left; on a terminal it moves often, in a log file rarely."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm.tqdm(
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


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or leaves the old one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl; a last line that a kill cut short is left out."""
    path = workdir / METRICS
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


class MetricWriter:
    """Scalars by step. Lines later than `resumed_at` are dropped: those steps are run again."""

    def __init__(self, workdir: Path, *, resumed_at: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        # Imported here: it takes half a second that only training need pay.
        from tensorboardX import SummaryWriter

        kept = [m for m in read_metrics(workdir) if m["step"] <= resumed_at]
        write_text(workdir / METRICS, "".join(json.dumps(m) + "\n" for m in kept))
        self._lines = open(workdir / METRICS, "a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_at + 1)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        if self._active:
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def images(self, step: int, name: str, picture: Any) -> None:
        """One uint8 picture [h, w, c]."""
        if self._active:
            self._events.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self._active:
            self._lines.close()
            self._events.close()
