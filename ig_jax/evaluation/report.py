"""The measures: how they are called, which way is better, and how numbers of them are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ig_jax.monitoring import console

# Name of a measure -> (heading, decimals, factor to what the heading says).
METRICS = {
    "outliers": ("outliers %", 1, 100.0),
    "fid": ("FID", 2, 1.0),
    "fd_dinov2": ("FD DINOv2", 2, 1.0),
    "fd": ("FD", 2, 1.0),
    "sfid": ("sFID", 2, 1.0),
    "accuracy": ("label accuracy %", 1, 100.0),
    "precision": ("precision %", 1, 100.0),
    "recall": ("recall %", 1, 100.0),
    "inception_score": ("IS", 2, 1.0),
    "nearest": ("nearest real", 2, 1.0),
}
# Which way is better, of those that a search may go by.
BETTER = {
    "fid": "lower",
    "fd_dinov2": "lower",
    "fd": "lower",
    "sfid": "lower",
    "accuracy": "higher",
    "precision": "higher",
    "recall": "higher",
    "inception_score": "higher",
    "outliers": "lower",
}


def to_text(name: str, stats: Mapping[str, float]) -> str:
    """'2.31 ± 0.05' in the unit of the measure's heading."""
    _, decimals, factor = METRICS[name]
    mean, std = (f"{stats[key] * factor:.{decimals}f}" for key in ("mean", "std"))
    return f"{mean} ± {std}" if stats["std"] else mean


def intervals(measures: Mapping[str, float], errors: Mapping[str, float]) -> str:
    """'FID 2.31 ± 0.08, ...', 1.96 standard errors, in the units of the headings."""
    parts = []
    for name, error in errors.items():
        heading, decimals, factor = METRICS[name]
        value, half = (f"{x * factor:.{decimals}f}" for x in (measures[name], 1.96 * error))
        parts.append(f"{heading} {value} ± {half}")
    return ", ".join(parts)


def spread(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{'fd': {'mean', 'std'}, ...} over seeds; the standard deviation is the sample's (n - 1)."""
    several = len(values) > 1
    return {
        name: {
            "mean": float(np.mean([v[name] for v in values])),
            "std": float(np.std([v[name] for v in values], ddof=1)) if several else 0.0,
        }
        for name in values[0]
    }


def table(results: Mapping[str, Mapping[str, Any]], corner: str = "") -> str:
    """A Markdown table, a row for each entry of {name: {measure: {'mean', 'std'}}}.

    `corner` stands above the names.
    """
    shown = [m for m in METRICS if m in next(iter(results.values()))]
    rows = [[corner, *(METRICS[m][0] for m in shown)]]
    rows += [[name, *(to_text(m, stats[m]) for m in shown)] for name, stats in results.items()]
    return console.markdown(rows)


def summary(record: Mapping[str, Any]) -> str:
    """The result in one line, with everything that numbers of others are compared by."""
    measures = record["measures"]
    parts = []
    for name, (heading, _, _) in METRICS.items():
        if name in measures:
            words, percent = heading.removesuffix(" %"), " %" * heading.endswith(" %")
            parts.append(f"{words} {to_text(name, measures[name])}{percent}")
    return f"{', '.join(parts)}: {record['of']}"
