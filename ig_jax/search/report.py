"""Report of a search: a table of the best settings, and a heat map of the metric over them.

Rows are those of `race.Search.rows`, best first. Uncertainties are standard errors over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.monitoring import console
from ig_jax.plots.figure import blank

SearchRow = Mapping[str, Any]

DISTINCT_ENOUGH = 8  # more different values than this make a field no more informative
PALE = 0.55  # share of white in what was measured on one seed
EMPTY = (0.93, 0.93, 0.93)
# Noise that all settings share on a seed lifts or lowers those measured on few seeds together.
SEEDS_NOTE = "n×: seeds, compare equal n"


def _number(stats: Mapping[str, float | None], decimals: int, factor: float, sign: str) -> str:
    """'2.31 ± 0.05', or '2.31' from one seed."""
    mean = f"{stats['mean'] * factor:{sign}.{decimals}f}"
    return mean if stats["error"] is None else f"{mean} ± {stats['error'] * factor:.{decimals}f}"


def _cells(
    rank: int, row: SearchRow, measures: Mapping[str, tuple[str, int, float]], metric: str
) -> list[str]:
    place = f"{rank} (config)" if row["default"] else str(rank)
    _, decimals, factor = measures[metric]
    own = row["default"]
    return [
        place,
        *(f"{value:g}" for value in row["candidate"].values()),
        str(row["seeds"]),
        _number(row[metric], decimals, factor, ""),
        "" if own else _number(row["minus_default"], decimals, factor, "+"),
        *(_number(row[m], d, f, "") for m, (_, d, f) in measures.items() if m != metric),
    ]


def search_table(
    rows: Sequence[SearchRow],
    measures: Mapping[str, tuple[str, int, float]],
    metric: str,
    best: int = 10,
) -> str:
    """A Markdown table of the best rows, and of the config's own setting wherever it stands.

    Args:
      rows: best first.
      measures: name -> (heading, decimals, factor to what the heading says); `metric` is shown
        first and compared with the config's own setting on the same seeds.
      best: rows shown.
    """
    heads = ["rank", *rows[0]["candidate"], "seeds", measures[metric][0], "minus config"]
    heads += [heading for m, (heading, _, _) in measures.items() if m != metric]
    ranked = list(enumerate(rows, 1))
    shown = [(rank, row) for rank, row in ranked if rank <= best or row["default"]]
    return console.markdown([heads, *(_cells(rank, row, measures, metric) for rank, row in shown)])


def informative_fields(rows: Sequence[SearchRow]) -> list[str]:
    """At most two fields: those with the most different values, of equal ones scales first."""
    distinct = {name: {row["candidate"][name] for row in rows} for name in rows[0]["candidate"]}
    varied = [name for name, values in distinct.items() if len(values) > 1]
    return sorted(
        varied,
        key=lambda name: (
            -min(len(distinct[name]), DISTINCT_ENOUGH),
            not name.endswith(".scale"),
            name,
        ),
    )[:2]


def _colours(means: Sequence[float], better: str) -> tuple[Any, Any]:
    """A colour scale, light for good, which a tenth of very bad settings cannot flatten."""
    from matplotlib.colors import Normalize

    finite = [m for m in means if np.isfinite(m)] or [0.0]
    if better == "lower":
        return Normalize(min(finite), np.quantile(finite, 0.9)), "viridis_r"
    return Normalize(np.quantile(finite, 0.1), max(finite)), "viridis"


def _line(axes: Any, rows: Sequence[SearchRow], metric: str, field: str) -> None:
    """Mean against the one field that varies; hollow where one seed gives no error bar."""
    rows = sorted(rows, key=lambda row: row["candidate"][field])
    x = [row["candidate"][field] for row in rows]
    axes.plot(x, [row[metric]["mean"] for row in rows], color="C0", alpha=0.4)
    for row, at in zip(rows, x, strict=True):
        axes.errorbar(
            at,
            row[metric]["mean"],
            yerr=row[metric]["error"] or 0.0,
            fmt="s" if row["default"] else "o",
            color="C3" if row["default"] else "C0",
            mfc="white" if row["seeds"] == 1 else None,
            capsize=3,
        )
        label = f"{row['seeds']}×"
        axes.annotate(label, (at, row[metric]["mean"]), (5, 5), textcoords="offset points")
    axes.set(xlabel=field, ylabel=f"{metric} (mean ± standard error)")
    axes.set_title(f"square: the config; {SEEDS_NOTE}", fontsize=9)


def _points(
    axes: Any, rows: Sequence[SearchRow], metric: str, fields: Sequence[str], better: str
) -> Any:
    """One disc a setting, the larger the more seeds."""
    norm, cmap = _colours([row[metric]["mean"] for row in rows], better)
    where = np.array([[row["candidate"][name] for name in fields] for row in rows]).T
    means = [row[metric]["mean"] for row in rows]
    sizes = [60 * row["seeds"] for row in rows]
    drawn = axes.scatter(*where, c=means, s=sizes, norm=norm, cmap=cmap, edgecolors="grey")
    own = next(i for i, row in enumerate(rows) if row["default"])
    for index, marker in ((0, "*"), (own, "x")):
        axes.scatter(*where[:, index], marker=marker, s=50, color="red")
    axes.set_title(
        "star: the best; cross: the config; larger: more seeds; compare equal ones", fontsize=9
    )
    return drawn


def _grid(
    axes: Any, rows: Sequence[SearchRow], metric: str, fields: Sequence[str], better: str
) -> Any:
    """A cell for each pair of values; paler on fewer seeds."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Rectangle

    columns, lines = (sorted({row["candidate"][name] for row in rows}) for name in fields)

    def place(row: SearchRow) -> tuple[int, int]:
        x, y = (row["candidate"][name] for name in fields)
        return lines.index(y), columns.index(x)

    # Best first: the last one written to a cell is the best over all other fields.
    cells = {place(row): row for row in reversed(rows)}
    norm, cmap = _colours([row[metric]["mean"] for row in cells.values()], better)
    scale = ScalarMappable(norm, cmap)
    image = np.full((len(lines), len(columns), 3), EMPTY)
    for (i, j), row in cells.items():
        pale = PALE * (1 - np.log2(row["seeds"]) / max(np.log2(rows[0]["seeds"]), 1))
        image[i, j] = pale + (1 - pale) * np.array(scale.to_rgba(row[metric]["mean"])[:3])
        text = f"{row[metric]['mean']:.3g}\n{row['seeds']}×"
        ink = "black" if image[i, j].mean() > 0.5 else "white"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    axes.imshow(image, origin="lower", aspect="auto")
    own = next(row for row in rows if row["default"])
    for row, side, colour in ((rows[0], 0.94, "red"), (own, 0.84, "black")):
        i, j = place(row)
        corner = (j - side / 2, i - side / 2)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, lw=2))
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(lines)), [f"{value:g}" for value in lines])
    axes.set_title(f"red: the best; black: the config; {SEEDS_NOTE}, paler on fewer", fontsize=9)
    return scale


def heat_map(path: Path, rows: Sequence[SearchRow], metric: str, better: str, method: str) -> None:
    """Draws the metric's mean over the two most informative fields, as PNG.

    A grid becomes cells, each with the best over all other fields; random points become discs;
    one varying field becomes a line with error bars.

    Args:
      path: the file.
      rows: of a whole search or a part, best first.
      better: lower or higher.
      method: of the space: grid or random.
    """
    fields = informative_fields(rows)
    figure = blank(8.0, 5.5)
    axes = figure.subplots()
    if len(fields) == 1:
        _line(axes, rows, metric, fields[0])
    else:
        draw = _grid if method == "grid" else _points
        drawn = draw(axes, rows, metric, fields, better)
        end = "max" if better == "lower" else "min"
        figure.colorbar(drawn, ax=axes, label=f"{metric} ({better} is better)", extend=end)
        axes.set(xlabel=fields[0], ylabel=fields[1])
    figure.savefig(path, dpi=120)
