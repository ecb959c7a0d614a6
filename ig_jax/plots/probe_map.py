"""Accuracies of linear probes by block and noise level, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ig_jax.io import files
from ig_jax.plots.figure import blank

CELL = 0.42  # inches


def draw(
    path: Path, accuracy: np.ndarray, times: Sequence[float], blocks: Sequence[int], title: str
) -> None:
    """Writes a PNG: a row for each noise level, a column for each block, the best cell framed.

    Args:
      path: of the image.
      accuracy: in [0, 1], [times, blocks].
      times, blocks: of the rows and columns.
      title: says of what images.
    """
    from matplotlib.patches import Rectangle

    percent = 100 * accuracy
    figure = blank(max(4.5, 2.2 + CELL * len(blocks)), 1.6 + CELL * len(times))
    axes = figure.subplots()
    shown = axes.imshow(percent, cmap="viridis", aspect="auto")
    for i, j in np.ndindex(*percent.shape):
        ink = "black" if shown.norm(percent[i, j]) > 0.6 else "white"
        text = f"{percent[i, j]:.0f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
    i, j = np.unravel_index(np.argmax(percent), percent.shape)
    axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="red", lw=2))
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(times)), [f"{t:g}" for t in times])
    axes.set(xlabel="block", ylabel="noise level t (0 is data)")
    axes.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes, label="accuracy %")
    with files.replaced(path) as hidden:
        figure.savefig(hidden, dpi=150, format="png")
