"""The demo, end to end at toy size: one command trains, samples, judges and draws."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from PIL import Image

from ig_jax import modes
from ig_jax.evaluation.report import METRICS
from ig_jax.parallel.preemption import Stopped
from ig_jax.plots import losses
from ig_jax.programs import demo
from ig_jax.training import trainer

OTHERS = {"outliers", "fid", "sfid", "fd_dinov2"}  # need a known density, or another feature space
OF_DIGITS = set(METRICS) - OTHERS
CHANGES = {"train.steps": 20, "evaluate.num": 100}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    modes.run(tiny.settings(CHANGES), workdir=str(workdir), mode="demo", import_seconds=1.5)
    return workdir


@pytest.fixture(scope="module")
def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_results_hold_every_way_of_sampling_beside_the_floor(results):
    assert list(results) == ["floor", "plain", "ig", "cfg", "ig_cfg", "settings", "seconds"]
    for name in ("floor", "plain", "ig", "cfg", "ig_cfg"):
        assert OF_DIGITS <= set(results[name]) and not OTHERS & set(results[name])
        for stats in results[name].values():
            assert set(stats) == {"mean", "std"} and np.isfinite(list(stats.values())).all()
    assert len({results[name]["fd"]["mean"] for name in ("plain", "ig", "cfg", "ig_cfg")}) == 4
    assert results["floor"]["accuracy"]["mean"] > 0.95


def test_results_say_what_was_run_and_how_long_each_part_took(results):
    assert results["settings"]["checkpoint_step"] == 20
    assert results["settings"]["seeds"] == [0, 1]
    assert results["settings"]["judged_together"] == 100  # of 355 held out as of 100 drawn
    assert set(results["seconds"]) == {"import", "compile", "train", "sample", "evaluate"}
    assert results["seconds"]["import"] == 1.5
    assert all(0 < seconds < 600 for seconds in results["seconds"].values())


@pytest.mark.parametrize("name", ["samples.png", "loss.png"])
def test_pictures_show_something(workdir, name):
    picture = np.asarray(Image.open(workdir / name).convert("RGB"))
    assert min(picture.shape[:2]) > 100
    assert picture.std() > 5 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_the_picture_of_samples_has_a_panel_for_every_way_and_a_column_for_every_class(workdir):
    picture = np.asarray(Image.open(workdir / "samples.png"))
    panel, gap = (picture.shape[1] - 5 * 16) // 4, 16
    assert 4 * panel + 5 * gap == picture.shape[1] and (panel - 2) % 10 == 0
    panels = [picture[30:, gap + i * (panel + gap) :][:, :panel] for i in range(4)]
    for i in range(4):
        for j in range(i):
            assert (panels[i] != panels[j]).any()


@pytest.mark.slow
def test_running_the_demo_again_trains_no_more_and_judges_the_same(workdir, results, monkeypatch):
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(trainer, "make_dispatch", lambda exp: None)  # calling it would raise
    again = modes.run(tiny.settings(CHANGES), workdir=str(workdir), mode="demo")
    assert (workdir / "metrics.jsonl").read_bytes() == before
    for name in ("floor", "plain", "ig", "cfg", "ig_cfg"):
        assert again[name] == results[name]


@pytest.mark.slow
def test_a_demo_stopped_while_training_judges_nothing(tmp_path, monkeypatch):
    stopped = replace(tiny.trained().outcome, step=3, finished=False, stopped_by="SIGTERM")
    monkeypatch.setattr(trainer, "train", lambda exp, workdir, held, init_from: stopped)
    with pytest.raises(Stopped, match="SIGTERM"):
        demo.run(tiny.experiment(), tmp_path, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_losses_are_drawn_from_any_metrics(tmp_path):
    lines = [{"images": n, "loss/flow": 1.0 / n, "loss/internal_guidance": 2.0 / n} for n in (1, 9)]
    sizes = []
    for chosen in (lines, [{k: v for k, v in m.items() if "internal" not in k} for m in lines]):
        losses.plot_losses(chosen, tmp_path / "loss.png")
        sizes.append((tmp_path / "loss.png").stat().st_size)
    assert sizes[0] > sizes[1] > 1000  # a curve less
    held_out = [{"images": n, losses.HELD_OUT: 3.0 / n} for n in (4, 8)]
    losses.plot_losses([*lines, *held_out], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > sizes[0]
