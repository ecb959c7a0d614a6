"""--mode=study and --mode=select at toy size: one command trains, measures, compares, writes."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import studies
from PIL import Image

from ig_jax import experiment as build
from ig_jax import modes
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.evaluation import base
from ig_jax.evaluation.image_evaluator import ImageEvaluator, make_evaluator
from ig_jax.generation import variants
from ig_jax.study import cells, measures, methods
from ig_jax.study.measures import weights
from ig_jax.training import trainer

TINY = {"train.steps": 4, "sample.batch_size": 10, "evaluate.num": 20}
METHODS = {
    "plain": {},
    "ig": {"same_run_as": "plain", "overrides": {"sample": {"ig": {"scale": 3.0}}}},
}


def settings(**study):
    small = {"methods": METHODS, "measures": ("fd", "precision", "probe")}
    probe = {"blocks": (1, 2), "time": 0.1}
    return studies.settings(TINY, **small, probe=probe, **study)


@pytest.fixture(scope="module", autouse=True)
def one_evaluator():
    """Its classifier is fitted once for all tests."""
    make = functools.cache(lambda: make_evaluator(exp.config, exp.mesh))
    exp = build.experiment(run_config.parse(settings(), jax.device_count()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "make_evaluator", lambda config, mesh: make())
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    modes.run(settings(), workdir=str(workdir), mode="study")
    return workdir


@pytest.fixture(scope="module")
def record(workdir):
    return json.loads((workdir / "study.json").read_text())


@pytest.mark.slow
def test_the_record_holds_every_method_seed_and_measure(record):
    assert list(record["methods"]) == ["plain", "ig"] and record["seeds"] == [3, 1]
    for method in record["methods"].values():
        for run in method["runs"]:
            asked = {"fd", "precision", "probe_1_0.1", "probe_2_0.1", "train_flops"}
            assert asked | {"train_seconds"} <= set(run)
    plain, ig = (record["methods"][name] for name in ("plain", "ig"))
    change = ig["measures"]["fd"]["minus_baseline"]["mean"]
    differences = [a["fd"] - b["fd"] for a, b in zip(ig["runs"], plain["runs"], strict=True)]
    assert change == pytest.approx(np.mean(differences)) and min(map(abs, differences)) > 0
    # One run is probed twice, and is the same run.
    assert ig["runs"][0]["probe_1_0.1"] == plain["runs"][0]["probe_1_0.1"]
    assert 0 < record["held_out_data"]["fd"] < plain["runs"][0]["fd"]


@pytest.mark.slow
def test_the_table_and_the_plot_are_written(workdir):
    lines = (workdir / "study.md").read_text().splitlines()
    first = [line.split("|")[1].strip() for line in lines]
    assert first[0] == "n = 2 seeds" and first[2:] == ["held-out data", "plain", "ig"]
    picture = np.asarray(Image.open(workdir / "study.png").convert("RGB"))
    assert picture.std() > 5


@pytest.mark.slow
def test_a_measurement_is_that_of_the_run_s_own_samples(workdir, record):
    exp = studies.experiment(settings())
    rows = methods.rows(exp, exp.config.study, workdir)
    of_seed = rows["ig"].of_seed(1)
    params = weights(of_seed, workdir / "cells" / "plain" / "seed_1", 4, "ema")
    evaluator, _ = measures.make_evaluator(exp.config, exp.mesh)

    class Bar:
        def update(self, n): ...

    generator = of_seed.pipeline.generator(decode=evaluator.decode)
    images, labels = variants.draw_samples(generator, params, 20, 1, Bar())
    found = base.compute_in_runs(evaluator, evaluator.extract(images), labels, 20)
    measured = record["methods"]["ig"]["runs"][1]
    assert measured["fd"] == pytest.approx(found["fd"], rel=1e-3)
    assert measured["nearest"] == pytest.approx(found["nearest"], rel=1e-3)


@pytest.mark.slow
def test_a_study_killed_while_sampling_goes_on_with_the_samples_that_are_left(
    workdir, tmp_path, monkeypatch
):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    cell = copy / "cells" / "ig" / "seed_3"
    (cell / "row.json").unlink()
    extract, seen = ImageEvaluator.extract, []

    def dying(self, images):
        if len(images) == 10:  # not the held-out ones
            seen.append(len(images))
            if len(seen) == 2:
                raise KeyboardInterrupt
        return extract(self, images)

    monkeypatch.setattr(ImageEvaluator, "extract", dying)
    monkeypatch.setattr(trainer, "run", lambda *a: pytest.fail("trained again"))
    with pytest.raises(KeyboardInterrupt):
        modes.run(settings(), workdir=str(copy), mode="study")
    modes.run(settings(), workdir=str(copy), mode="study")
    assert seen == [10, 10, 10]
    again = (cell / "row.json").read_bytes()
    assert again == (workdir / "cells" / "ig" / "seed_3" / "row.json").read_bytes()
    assert not (cell / ".samples").exists()
    assert (copy / "study.md").read_bytes() == (workdir / "study.md").read_bytes()


# Select.


def choice(**select):
    values = {"objective": {"terms": {"internal_guidance": {"weight": (0.1, 0.5)}}}}
    c = studies.settings(TINY)
    c.select = {"values": values, "seeds": (2, 5), "metric": "loss", **select}
    return c


@pytest.mark.slow
def test_candidates_are_trained_once_and_ranked(tmp_path, monkeypatch):
    found = modes.run(choice(), workdir=str(tmp_path), mode="select")
    own, other = "weight=0.5", "weight=0.1"
    means = {n: found["methods"][n]["measures"]["loss"]["mean"]["mean"] for n in (own, other)}
    assert found["ranking"] == sorted(means, key=means.get) and found["baseline"] == own
    assert json.loads((tmp_path / "select.json").read_text()) == json.loads(json.dumps(found))
    assert f"{own} (config)" in (tmp_path / "select.md").read_text()
    assert (tmp_path / "select.png").stat().st_size > 3000
    monkeypatch.setattr(cells, "SeededPrograms", lambda exp: pytest.fail("trained again"))
    again = modes.run(choice(), workdir=str(tmp_path), mode="select")
    assert again["ranking"] == found["ranking"]


def test_a_metric_that_ranks_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="^select.metric = 'nearest': must be one of loss, fid, fd"):
        modes.run(choice(metric="nearest"), workdir=str(tmp_path), mode="select")
