"""Empty figures for plots."""

from __future__ import annotations

from typing import Any


def blank(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches; matplotlib is imported only by those who plot."""
    # The object interface draws without a display, whatever backend the machine prefers.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
