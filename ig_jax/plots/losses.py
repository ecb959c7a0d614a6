"""Loss curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ig_jax.plots.figure import blank

HELD_OUT = "eval/loss"  # the loss of held-out examples, in metrics
_NAMES = {
    "loss/flow": "final output",
    "loss/internal_guidance": "intermediate readout",
    HELD_OUT: "final output, held-out examples",
}


def plot_losses(metrics: list[dict[str, Any]], path: Path) -> None:
    """Every loss term against images seen, as PNG."""
    figure = blank(7.0, 4.0)
    axes = figure.subplots()
    lowest = math.inf
    keys = (n for m in metrics for n in m if n.startswith("loss/") or n == HELD_OUT)
    for key in dict.fromkeys(keys):
        points = [(m["images"], m[key]) for m in metrics if {"images", key} <= m.keys()]
        style = "k--" if key == HELD_OUT else "-"
        label = _NAMES.get(key, key.removeprefix("loss/"))
        axes.plot(*zip(*points, strict=True), style, label=label)
        lowest = min(lowest, *(value for _, value in points))
    axes.set(xlabel="images seen", ylabel="loss, unweighted")
    if 0 < lowest < math.inf:  # some terms are negative: minus a similarity
        axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
