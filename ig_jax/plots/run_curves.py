"""Curves of several runs on one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.plots.figure import blank
from ig_jax.plots.losses import HELD_OUT

_COLUMNS = 3
_SMOOTHED = 0.05  # of a curve's points are averaged, at least

Curve = tuple[list[int], list[float | int]]  # steps, values
Curves = dict[str, dict[str, Curve]]  # by measure, then by run


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Curves:
    """Losses by term, and evaluations.

    Args:
      runs: name -> lines of metrics.jsonl.
    """
    found: Curves = {}
    for name, lines in runs.items():
        for line in lines:
            for key, value in line.items():
                if key == "loss" or key.startswith(("loss/", "eval/")):
                    at, values = found.setdefault(key, {}).setdefault(name, ([], []))
                    at.append(line["step"])
                    values.append(value)
    return found


def smoothed(values: Sequence[float | int]) -> np.ndarray:
    """Means over a window that is cut at both ends, so that they never lag behind."""
    half = max(1, round(_SMOOTHED * len(values) / 2))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    centre = np.arange(len(values))
    reach = np.minimum(half, np.minimum(centre, len(values) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def draw(found: Curves, runs: Sequence[str], path: Path) -> None:
    """A panel for every measure, a colour for every run: raw values faint, smoothed ones strong."""
    rows = -(-len(found) // _COLUMNS)
    figure = blank(4.2 * min(_COLUMNS, len(found)), 3.1 * rows)
    panels = figure.subplots(rows, min(_COLUMNS, len(found)), squeeze=False).ravel()
    colours = {name: f"C{i % 10}" for i, name in enumerate(runs)}
    for axes, (measure, by_run) in zip(panels, found.items(), strict=False):
        for name, (at, values) in by_run.items():
            if measure.startswith("eval/"):
                axes.plot(at, values, "o-", color=colours[name], label=name)
                continue
            axes.plot(at, values, color=colours[name], alpha=0.25)
            axes.plot(at, smoothed(values), color=colours[name], label=name)
        title = "held-out loss" if measure == HELD_OUT else measure.removeprefix("eval/")
        axes.set(xlabel="step", title=title)
        if measure.startswith("loss") and all(min(v) > 0 for _, v in by_run.values()):
            axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)
