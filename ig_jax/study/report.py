"""A study's table, its plot, and its record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ig_jax.evaluation.report import METRICS
from ig_jax.io import files
from ig_jax.monitoring import console, flops
from ig_jax.parallel import lock
from ig_jax.plots.figure import blank
from ig_jax.study import probe
from ig_jax.study.paired import Interval, interval, paired

Rows = Mapping[str, Sequence[Mapping[str, float]]]  # by method, in the order of the seeds

# Beside those of an evaluation; of differences, a digit more is of use.
_OTHERS = {
    "fid": ("FID", 3, 1.0),
    "fd": ("FD", 3, 1.0),
    "loss": ("held-out loss", 4, 1.0),
    "train_flops": ("training FLOPs", 0, 1.0),
    "train_seconds": ("training s", 0, 1.0),
}
COST = ("train_flops", "train_seconds")


def shown(measure: str) -> tuple[str, int, float]:
    """(heading, decimals, factor to what the heading says) of a measure."""
    if measure.startswith("probe_"):
        return probe.heading(measure), 1, 100.0
    return _OTHERS.get(measure) or METRICS[measure]


def _values(runs: Sequence[Mapping[str, float]], measure: str) -> list[float]:
    return [run[measure] for run in runs]


def compare(rows: Rows, baseline: str, measures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{method: {measure: {'mean': Interval, 'minus_baseline': Interval or None}}}."""
    return {
        name: {
            m: {
                "mean": interval(_values(runs, m)),
                "minus_baseline": None
                if name == baseline
                else paired(_values(runs, m), _values(rows[baseline], m)),
            }
            for m in measures
        }
        for name, runs in rows.items()
    }


def to_text(value: Interval, measure: str, sign: str = "") -> str:
    """'1.153 ± 0.069' in the unit of the measure's heading."""
    _, decimals, factor = shown(measure)
    return f"{value.mean * factor:{sign}.{decimals}f} ± {value.half * factor:.{decimals}f}"


def _cell(stats: Mapping[str, Interval | None], measure: str) -> str:
    """The mean, and the difference, bold where its interval leaves out 0."""
    own, change = to_text(stats["mean"], measure), stats["minus_baseline"]
    if change is None:
        return own
    text = to_text(change, measure, "+")
    return f"{own} ({f'**{text}**' if change.excludes_zero else text})"


def table(
    rows: Rows, baseline: str, measures: Sequence[str], floor: Mapping[str, float] | None = None
) -> str:
    """Markdown: a method a row, a measure a column, cost last.

    Args:
      rows: measures and cost of every run.
      baseline: the method that the others are compared with, seed by seed.
      measures: names.
      floor: measures of held-out data, for a row of their own.
    """
    found = compare(rows, baseline, (*measures, *COST))
    lines = [[f"n = {len(rows[baseline])} seeds", *(shown(m)[0] for m in (*measures, *COST))]]
    if floor:
        lines.append(["held-out data", *(_single(floor, m) for m in (*measures, *COST))])
    for name in rows:
        cells = [_cell(found[name][m], m) for m in measures]
        lines.append([name, *cells, *(_cost(found, name, baseline, m) for m in COST)])
    return console.markdown(lines)


def _single(floor: Mapping[str, float], measure: str) -> str:
    _, decimals, factor = shown(measure)
    return f"{floor[measure] * factor:.{decimals}f}" if measure in floor else ""


def _cost(found: Mapping[str, Any], name: str, baseline: str, measure: str) -> str:
    """The mean, and how many times the baseline's it is."""
    mean, base = (found[n][measure]["mean"].mean for n in (name, baseline))
    text = flops.in_words(int(mean)) if measure == "train_flops" else f"{mean:.0f}"
    return f"{text} ({mean / base:.2f}×)"


def draw(path: Path, rows: Rows, baseline: str, measures: Sequence[str]) -> None:
    """Differences from the baseline with their intervals, a panel for each measure, as PNG."""
    found = compare(rows, baseline, measures)
    names = [name for name in rows if name != baseline][::-1]
    figure = blank(1.8 + 2.6 * len(measures), 1.4 + 0.32 * len(names))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        heading, _, factor = shown(measure)
        for y, name in enumerate(names):
            change = found[name][measure]["minus_baseline"]
            half = 0.0 if math.isnan(change.half) else change.half * factor
            colour = "C0" if change.excludes_zero else "grey"
            axes.errorbar(change.mean * factor, y, xerr=half, fmt="o", color=colour, capsize=3)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_xlabel(f"{heading}, minus {baseline}", fontsize=8)
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    figure.savefig(path, dpi=120)


def record(
    rows: Rows, baseline: str, seeds: Sequence[int], measures: Sequence[str]
) -> dict[str, Any]:
    """All of it for JSON: intervals as mean and half width, and every run's own numbers."""
    found = compare(rows, baseline, (*measures, *COST))

    def plain(value: Interval | None) -> dict[str, float] | None:
        return None if value is None else {"mean": value.mean, "half": value.half}

    return {
        "baseline": baseline,
        "seeds": list(seeds),
        "methods": {
            name: {
                "measures": {
                    m: {kind: plain(value) for kind, value in stats.items()}
                    for m, stats in found[name].items()
                },
                "runs": [dict(run) for run in runs],
            }
            for name, runs in rows.items()
        },
    }


def write(
    workdir: Path,
    stem: str,
    table: str,
    record: Mapping[str, Any],
    plot: Callable[[Path], None],
) -> None:
    """Writes <stem>.md, .json and .png, unless another process is just writing the same."""
    with suppress(lock.InUse), lock.held(workdir, f".{stem}.lock"):
        files.write_text(workdir / f"{stem}.md", table + "\n")
        files.write_json(workdir / f"{stem}.json", record)
        plot(workdir / f"{stem}.png")


def ranked(rows: Rows, measure: str, better: str) -> list[str]:
    """Methods by the mean of a measure, best first; a mean that is not finite is the worst."""
    sign = {"lower": 1, "higher": -1}[better]
    means = {name: sign * interval(_values(runs, measure)).mean for name, runs in rows.items()}
    return sorted(means, key=lambda n: means[n] if math.isfinite(means[n]) else math.inf)


def ranking(rows: Rows, order: Sequence[str], own: str, measure: str) -> str:
    """Markdown: candidates in order, their measure, and the difference from the config's own."""
    found = compare(rows, own, (measure, *COST))
    lines = [["rank", "candidate", shown(measure)[0], "minus config", shown(COST[0])[0]]]
    for rank, name in enumerate(order, 1):
        stats = found[name][measure]
        change = stats["minus_baseline"]
        text = "" if change is None else to_text(change, measure, "+")
        lines.append(
            [
                str(rank),
                f"{name} (config)" if name == own else name,
                to_text(stats["mean"], measure),
                f"**{text}**" if change is not None and change.excludes_zero else text,
                _cost(found, name, own, COST[0]),
            ]
        )
    return console.markdown(lines)
