"""The Python blocks of README.md and docs/api.md, and the notebook, run as they stand."""

import json
import os
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny

from ig_jax import modes
from ig_jax.samplers import SAMPLERS

MORE = {"model.depth": 4, "model.readouts": (2,)}  # the depths that the examples name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run in runs/digits."""
    folder = tmp_path_factory.mktemp("project")
    changes = {**MORE, "train.steps": 4, "checkpoint.every_steps": 4}
    modes.run(tiny.settings(changes), workdir=folder / "runs" / "digits")
    return folder


def blocks(page: str) -> list[str]:
    """The Python blocks of a page that use `ig_jax` or what a block before it made."""
    text = (tiny.ROOT / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(code: str, folder: Path, monkeypatch) -> dict:
    """The names that a program leaves, started in the folder."""
    monkeypatch.chdir(folder)
    # Dataclasses look up annotations through their module's name.
    module = type(sys)("example")
    monkeypatch.setitem(sys.modules, "example", module)
    exec(compile(code, "example", "exec"), module.__dict__)
    return vars(module)


def test_the_block_of_the_readme(folder, monkeypatch):
    [block] = [b for b in blocks("README.md") if "ig_jax.load" in b]
    assert len(block.splitlines()) <= 10
    names = run(block, folder, monkeypatch)
    assert names["images"].shape == (2, 8, 8, 1) and names["images"].dtype == np.uint8
    assert names["trajectory"].shape == (1, 3, 8, 8, 1)
    assert names["tokens"].keys() == {2, 4} and names["readouts"].keys() == {2}


@pytest.mark.slow
def test_the_blocks_of_the_api_page(folder, monkeypatch):
    monkeypatch.setattr("ig_jax.api.SAMPLERS", SAMPLERS)
    try:
        names = run(
            "\n".join(blocks("docs/api.md")).replace('"0.999"', '"0.8"'), folder, monkeypatch
        )
    finally:
        SAMPLERS.pop("slow", None)
    assert names["many"].shape == (40, 8, 8, 1)
    assert names["rgb"].shape == (2, 4, 4, 3) and names["shares"].shape == (2, 3)
    assert names["found"].validation.shape == (2, 2) and 0 <= names["low"] <= names["accuracy"]
    np.testing.assert_allclose(
        names["guided"], 2 * names["v"] - names["readouts"][2], rtol=0, atol=1e-5
    )


@pytest.mark.slow
def test_the_notebook(folder, monkeypatch):
    matplotlib.use("agg")
    notebook = json.loads((tiny.ROOT / "docs" / "tour.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names = run("\n".join(cells), folder, monkeypatch)
    assert len(names["rows"]) == 7 and len(names["gaps"]) == 10
    for image in ("ig_sweep.png", "features_by_depth.png"):
        assert os.path.getsize(folder / image) > 5000
