"""Empty figures for plots, always drawn by Agg."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any


def _import_matplotlib() -> None:
    """As `import matplotlib`, which fails where MPLBACKEND names a backend that is not installed.

    Notebooks hand such a name to the programs that they start. Where it does exist, it stays the
    default of whoever uses pyplot in this process.
    """
    if "matplotlib" in sys.modules:
        return
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    if named:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = named


def blank(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches; matplotlib is imported only by those who plot."""
    _import_matplotlib()
    # The object interface draws without a display, whatever backend the machine prefers.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
