"""Figures are drawn by Agg, whatever backend the environment of the program names."""

import os
import subprocess
import sys

import pytest
from places import ROOT

DRAW = """
import os
from ig_jax.plots import figure
drawn = figure.blank(1, 1)
drawn.subplots().plot([1, 2])
drawn.savefig("figure.png")
import matplotlib
print(type(drawn.canvas).__name__, os.environ["MPLBACKEND"], matplotlib.rcParams["backend"])
"""


@pytest.mark.parametrize(
    "named, default",
    [
        ("module://matplotlib_inline.backend_inline", "agg"),
        pytest.param("nonsense", "agg", marks=pytest.mark.slow),
        pytest.param("svg", "svg", marks=pytest.mark.slow),
    ],
)
def test_a_figure_is_drawn_whatever_mplbackend_says(tmp_path, named, default):
    """And pyplot keeps the named default where there is one, as a notebook expects."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": named}
    done = subprocess.run(
        [sys.executable, "-c", DRAW], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"FigureCanvasAgg {named} {default}\n"
    assert (tmp_path / "figure.png").stat().st_size > 1000
