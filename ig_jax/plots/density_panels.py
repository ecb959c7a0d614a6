"""Samples in the plane, a panel for each way of drawing them, over the density they should follow.

Colours and sizes are chosen for a README: 900 pixels wide on the page, drawn at twice that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from ig_jax.plots.figure import blank

_COLUMNS = 3
COLOURS = ("#2b6cb0", "#e08a1e")  # class 0, class 1
OUTLIER = "#d1006c"
_GRID = 320  # places along x where the density is evaluated
WIDTH, DPI = 9.0, 200  # inches

Points = Float[np.ndarray, "n 2"]
Classes = Int[np.ndarray, "n"]


@runtime_checkable
class Density(Protocol):
    """A known density of two classes."""

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of what is worth drawing."""
        ...

    def log_density(self, points: Points, labels: Classes) -> Float64[np.ndarray, "n"]: ...

    def threshold(self, quantile: float = 0.01) -> float: ...

    def is_outlier(self, points: Points, labels: Classes) -> Bool[np.ndarray, "n"]: ...


def _backdrop(density: Density) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """x [w], y [h] and the log density of each class [h, w]."""
    left, right, bottom, top = density.extent
    x = np.linspace(left, right, _GRID)
    y = np.linspace(bottom, top, round(_GRID * (top - bottom) / (right - left)))
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    classes = [np.full(len(points), label) for label in range(len(COLOURS))]
    return x, y, [density.log_density(points, c).reshape(len(y), len(x)) for c in classes]


def _fill(axes: Any, density: Density, backdrop: tuple) -> None:
    """The regions that hold 99 % and 60 % of each class, one over the other."""
    x, y, log_densities = backdrop
    for log_density, colour in zip(log_densities, COLOURS, strict=True):
        for quantile in (0.01, 0.4):
            levels = [density.threshold(quantile), np.inf]
            axes.contourf(x, y, log_density, levels, colors=[colour], alpha=0.15)


def _dots(axes: Any, points: np.ndarray, labels: np.ndarray, outlier: np.ndarray) -> list[Any]:
    """Handles for the legend."""
    style = {"linestyle": "", "marker": ".", "markeredgewidth": 0}
    kinds = [
        (f"class {c}", ~outlier & (labels == c), colour, 1.6, 0.6)
        for c, colour in enumerate(COLOURS)
    ]
    handles = []
    for name, chosen, colour, size, alpha in [*kinds, ("outlier", outlier, OUTLIER, 2.6, 0.9)]:
        x, y = points[chosen].T
        handles += axes.plot(x, y, color=colour, markersize=size, alpha=alpha, label=name, **style)
    return handles


def draw(
    path: Path,
    density: Density,
    named: Mapping[str, tuple[Points, Classes]],
    rates: Mapping[str, float],
) -> None:
    """Writes a PNG, 1800 pixels wide: three panels in a row, each under its name and outlier rate.

    Outliers are drawn last and in a colour of their own. Points beyond the extent are not seen.

    Args:
      path: of the image.
      density: what the points should follow.
      named: points and classes of each panel.
      rates: share of outliers of each panel, in 0..1.
    """
    left, right, bottom, top = density.extent
    rows = -(-len(named) // _COLUMNS)
    height = rows * (WIDTH / _COLUMNS * (top - bottom) / (right - left) + 0.3) + 0.35
    figure = blank(WIDTH, height)
    backdrop = _backdrop(density)
    all_axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in all_axes:
        axes.set_axis_off()
    for axes, (name, (points, labels)) in zip(all_axes, named.items(), strict=False):
        _fill(axes, density, backdrop)
        handles = _dots(axes, points, labels, density.is_outlier(points, labels))
        axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        axes.set_title(f"{name}: {100 * rates[name]:.1f} % outliers", fontsize=10)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, markerscale=5, frameon=False
    )
    figure.savefig(path, dpi=DPI)
