"""A run without classes, from a flat folder of images to a number."""

import json

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image
from readme import example

from ig_jax import modes
from ig_jax.checkpoint import compatibility
from ig_jax.metrics import FEATURES


@pytest.fixture
def flat(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "real" / f"{i}.png")
    return tmp_path / "real"


def settings(flat, **changes):
    source = {"name": "image_folder", "path": str(flat), "size": 8, "num_classes": 1}
    return tiny.settings({"data.source": source | changes})


@pytest.mark.slow
def test_a_dry_run_tells_what_the_data_set_holds(flat, capsys):
    modes.run(settings(flat), workdir="unused", dry_run=True)
    told = capsys.readouterr().out.splitlines()
    assert told.count(f"data: 16 images, no classes, in {flat}") == 1


@pytest.mark.parametrize("sections", [compatibility.CONTINUES, compatibility.SAMPLES])
def test_whether_there_may_be_fewer_classes_parts_no_runs(flat, sections):
    older = settings(flat).to_dict()
    for value in (False, True):
        newer = settings(flat, fewer_classes=value).to_dict()
        assert compatibility.mismatches(older, newer, sections) == []
        assert compatibility.mismatches(newer, older, sections) == []
    other = settings(flat, size=16).to_dict()
    assert compatibility.mismatches(older, other, compatibility.CONTINUES)


@pytest.mark.slow
def test_it_trains_samples_and_is_judged_without_classes(flat, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FEATURES, "thumbnails", example("Thumbnails"))
    c = settings(flat)
    c.evaluate.features = ConfigDict({"name": "thumbnails", "side": 2})
    c.update({"train": {"steps": 6, "batch_size": 8}, "sample": {"num": 12, "batch_size": 12}})
    c.evaluate.update(ConfigDict({"num": 12, "seeds": (0,)}))
    workdir = str(tmp_path / "run")
    modes.run(c, workdir=workdir)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("data: ")] == [
        f"data: 16 images, no classes, in {flat}"
    ]
    target = modes.run(c, workdir=workdir, mode="sample")
    with np.load(target / "samples.npz") as drawn:
        assert drawn["arr_0"].shape == (12, 8, 8, 3) and not drawn["arr_1"].any()
    modes.run(c, workdir=str(tmp_path / "reference"), mode="reference")
    c.evaluate.reference = str(tmp_path / "reference" / "reference.npz")
    record = modes.run(c, workdir=workdir, mode="evaluate")
    assert record["measures"]["fd"]["mean"] > 0 and json.dumps(record)
