"""Evaluation: real images, copies and noise get the verdicts they deserve; what a run writes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from ig_jax import guidance, pytree
from ig_jax.data.sources.digits import Digits
from ig_jax.errors import UserError
from ig_jax.evaluation import base, image_evaluator
from ig_jax.evaluation import report as metrics_report
from ig_jax.evaluation.feature_extractor import FeatureExtractor
from ig_jax.evaluation.report import METRICS
from ig_jax.generation import variants
from ig_jax.guidance import Guidance
from ig_jax.metrics import influence
from ig_jax.metrics.classifier import Classifier
from ig_jax.programs import evaluate, sample

# Outliers need a density that is known, FID, sFID and FD DINOv2 another feature space.
BAD = (None, [], {}, [1], True)
OF_DIGITS = set(METRICS) - {"outliers", "fid", "sfid", "fd_dinov2"}


@pytest.fixture(scope="module")
def exp():
    return tiny.experiment()


@pytest.fixture(scope="module")
def judged(exp):
    """The evaluator, and its verdict on the held-out images."""
    evaluator, held_out = image_evaluator.make_evaluator(exp.config, exp.mesh)
    return evaluator, evaluator.compute(*held_out)


def measure(judged, images, labels):
    return judged[0].compute(judged[0].extract(images), labels)


def real(split):
    source = Digits(split)
    batch = source.batch(np.arange(len(source)))
    return batch["stored"], batch["label"]


def test_held_out_images_are_close_to_the_training_images_but_no_copies(judged):
    _, floor = judged
    assert floor == measure(judged, *real("held_out"))
    assert set(floor) == {*OF_DIGITS, "inception_score_torch_fidelity"}
    assert set(judged[0].metrics) == OF_DIGITS
    assert floor["accuracy"] > 0.95
    assert floor["precision"] > 0.9 and floor["recall"] > 0.9
    assert 8.5 < floor["inception_score"] <= 10
    assert floor["nearest"] > 0.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_told(exp, value):
    """As those of a damaged file of weights."""
    layers = {"kernel": np.full((64, 4), value, np.float32), "bias": np.zeros(4, np.float32)}
    last = {"kernel": np.ones((4, 2), np.float32), "bias": np.zeros(2, np.float32)}
    weights = {"hidden": layers, "classes": last}
    size = exp.config.sample.batch_size
    look = FeatureExtractor(Classifier(), weights, exp.local_mesh, size, "evaluate.features")
    with pytest.raises(UserError, match="evaluate.features: '.*' of some image is NaN or inf"):
        look(np.full((3, 8, 8, 1), 255, np.uint8))


def test_training_images_are_unmasked_as_copies(judged):
    _, floor = judged
    copies = measure(judged, *real("train"))
    assert copies["nearest"] == 0
    assert copies["fd"] == pytest.approx(0, abs=1e-6) and copies["fd"] < floor["fd"]
    assert copies["precision"] == copies["recall"] == 1
    assert copies["accuracy"] > 0.99


def test_noise_is_worse_than_held_out_images_in_every_measure(judged):
    _, floor = judged
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    found = measure(judged, noise, rng.integers(0, 10, 300))
    assert found["fd"] > 10 * floor["fd"] and found["nearest"] > 2 * floor["nearest"]
    assert found["accuracy"] < 0.3
    for name in ("precision", "recall", "inception_score"):
        assert found[name] < 0.8 * floor[name]


def test_the_inception_score_is_a_mean_over_runs_of_5000_in_order(judged):
    """Ten classes one after the other, each 500 times: of 5000 all are there, of 500 only one."""
    by_class = np.repeat(np.eye(10, dtype=np.float32) * 100, 500, axis=0)
    alike = np.tile(by_class[:1], (5000, 1))
    # Without the neighbours that precision and recall would look for.
    evaluator = replace(judged[0], real=replace(judged[0].real, rows=None))
    features = np.random.default_rng(0).standard_normal((10_000, evaluator.real.pool.mean.size))
    rows = {"pool": features, "nearest": np.ones(10_000)}
    found = evaluator.compute({**rows, "logits": np.concatenate([by_class, alike])}, None)
    assert found["inception_score"] == pytest.approx((10 + 1) / 2, rel=1e-6)


@pytest.mark.slow
def test_sets_of_different_sizes_are_compared_in_runs_of_one_size(judged):
    """Training images are at no distance from themselves, a quarter of them far: it is the size."""
    evaluator, floor = judged
    images, labels = (x[np.random.default_rng(0).permutation(1442)] for x in real("train"))
    rows = evaluator.extract(images)
    found = base.compute_in_runs(evaluator, rows, labels, 355)
    runs = [{n: r[i : i + 355] for n, r in rows.items()} for i in (0, 355, 710, 1065)]
    expected = np.mean([evaluator.compute(r, None)["fd"] for r in runs])
    assert found["fd"] == pytest.approx(expected, rel=1e-12)
    assert evaluator.compute(rows, labels)["fd"] < 1e-6 < 0.3 * floor["fd"] < found["fd"]
    assert found["accuracy"] > 0.99 and found["nearest"] == 0
    with pytest.raises(ValueError, match="size = 1500: there are only 1442 samples"):
        base.compute_in_runs(evaluator, rows, labels, 1500)


def test_wrong_labels_cost_accuracy_alone(judged):
    _, floor = judged
    images, labels = real("held_out")
    found = measure(judged, images, (labels + 1) % 10)
    assert found["accuracy"] < 0.02
    assert {**found, "accuracy": floor["accuracy"]} == floor


def test_images_of_one_class_are_precise_but_recall_little(judged):
    images, labels = real("held_out")
    found = measure(judged, images[labels == 0], labels[labels == 0])
    assert found["precision"] > 0.8 and found["recall"] < 0.3
    assert found["inception_score"] < 1.2


def test_nearest_is_the_median_distance_in_pixels_from_minus_one_to_one(judged):
    """Copies in which one pixel is 51 grey levels off are 51 / 127.5 = 0.4 away."""
    images, labels = real("train")
    images, labels = images[:30].copy(), labels[:30]
    images[:20, 0, 0, 0] ^= 51  # the corner pixel is 0 in all of them
    assert measure(judged, images, labels)["nearest"] == pytest.approx(0.4)


def test_without_labels_all_is_measured_but_accuracy(judged):
    images, labels = real("held_out")
    with_labels = measure(judged, images, labels)
    del with_labels["accuracy"]
    assert measure(judged, images, None) == with_labels


def test_what_is_kept_of_a_picture_does_not_depend_on_the_batch(judged):
    images, _ = real("held_out")
    together = judged[0].extract(images)
    alone = judged[0].extract(images[37:38])
    for name, row in judged[0].rows((8, 8, 1)).items():
        assert together[name].shape == (len(images), *row.shape)
        assert together[name].dtype == row.dtype
        np.testing.assert_array_equal(alone[name][0], together[name][37])


@pytest.mark.slow
def test_one_device_gives_the_verdict_of_two(judged):
    images, labels = real("held_out")
    alone = tiny.made_for(
        image_evaluator.make_evaluator, tiny.experiment(devices=jax.devices()[:1])
    )
    assert len(jax.devices()) == 2
    several, one = judged[0].extract(images), alone[0].extract(images)
    for name in several:
        np.testing.assert_allclose(one[name], several[name], rtol=0, atol=2e-5)
    for name, value in judged[0].compute(several, labels).items():
        assert alone[0].compute(one, labels)[name] == pytest.approx(value, rel=1e-5), name


def test_a_source_without_held_out_images_has_no_floor():
    _, floor = tiny.made_for(
        image_evaluator.make_evaluator, tiny.experiment({"data.source.split": "held_out"})
    )
    assert floor is None


INCEPTION = {"evaluate.features": {"name": "inception", "weights": "weights/no.pth"}}
LATENTS = {
    "data.source": {"name": "synthetic", "side": 8, "channels": 1, "num_classes": 10, "size": 9},
    "data.codec": {"name": "as_stored"},
}


def test_what_judging_needs_is_named_where_it_is_missing():
    for changes, sentence in (
        (INCEPTION, "evaluate.features: weights = .*pt_inception-2015.*mseitzer/pytorch-fid"),
        (LATENTS, "evaluate.features.name = 'classifier': is fitted on the images"),
        ({"evaluate.reference": "no.npz"}, "evaluate.reference = no.npz: cannot be read"),
    ):
        with pytest.raises(UserError, match=sentence):
            tiny.made_for(image_evaluator.make_evaluator, tiny.experiment(changes))


OFF = {"ig": {"sample.ig.scale": 1.0}, "cfg": {"sample.cfg.scale": 1.0}}
AUTO = {"sample.autoguidance.scale": 1.5, "sample.guide.workdir": "elsewhere"}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["plain", "ig", "cfg", "ig_cfg"]),
        (OFF["cfg"], ["plain", "ig"]),
        (OFF["ig"], ["plain", "cfg"]),
        ({**OFF["ig"], **OFF["cfg"]}, ["plain"]),
        (AUTO, ["plain", "ig", "cfg", "autoguidance", "ig_cfg"]),
        ({**AUTO, **OFF["ig"]}, ["plain", "cfg", "autoguidance"]),
    ],
)
def test_every_guidance_that_is_on_is_judged_alone_and_together(changes, names):
    exp = tiny.experiment(changes)
    found = variants.variants(exp.config.sample.guidances)
    assert list(found) == names
    given = exp.config.sample.guidances
    for name, guidances in found.items():
        assert set(guidances) == set(given)
        for kind, g in guidances.items():
            scale = given[kind].scale if kind in name.split("_") else 1.0
            assert g == replace(given[kind], scale=scale)


def test_spread_is_the_mean_and_the_sample_deviation():
    found = metrics_report.spread([{"fd": 1.0}, {"fd": 2.0}, {"fd": 6.0}])
    assert found == {"fd": {"mean": 3.0, "std": pytest.approx(7**0.5)}}
    assert metrics_report.spread([{"fd": 1.5}]) == {"fd": {"mean": 1.5, "std": 0.0}}


def test_the_readout_alone_comes_first_where_asked_and_is_internal_guidance_at_scale_0():
    exp = tiny.experiment()
    found = variants.variants(exp.config.sample.guidances, readout=True)
    assert list(found) == ["readout", "plain", "ig", "cfg", "ig_cfg"]
    alone = found["readout"]
    assert alone["ig"] == Guidance(0.0, 0.0, 1.0)
    assert {alone[kind].scale for kind in ("cfg", "autoguidance")} == {1.0}
    without = variants.variants(tiny.experiment(OFF["ig"]).config.sample.guidances, readout=True)
    assert list(without) == ["plain", "cfg"]


def test_a_table_has_a_row_for_each_result_in_the_units_of_its_heading():
    shown = [name for name in METRICS if name in OF_DIGITS]
    stats = {name: {"mean": 0.5, "std": 0.0} for name in shown}
    spread = {name: {"mean": 0.12345, "std": 0.004} for name in shown}
    lines = metrics_report.table({"held-out": stats, "plain": spread}).splitlines()
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
    assert cells[0][1:] == [
        *("FD", "label accuracy %", "precision %", "recall %", "IS", "nearest real")
    ]
    assert set("".join(cells[1])) == {"-"}
    assert cells[2] == ["held-out", "0.50", "50.0", "50.0", "50.0", "0.50", "0.50"]
    assert cells[3][:3] == ["plain", "0.12 ± 0.00", "12.3 ± 0.4"]
    assert len({len(line) for line in lines}) == 1


class Bar:
    total = 0

    def update(self, n: int) -> None:
        self.total += n


def test_standard_errors_of_all_measures_are_known_of_enough_samples(judged):
    evaluator = judged[0]
    rows = evaluator.extract(evaluator.training[:300])
    measures = evaluator.compute(rows, None)
    errors = evaluator.standard_errors(rows, measures)
    assert list(errors) == ["fd", "precision", "recall", "inception_score"]
    n = len(evaluator.training)
    assert errors["recall"] == pytest.approx(
        np.sqrt(measures["recall"] * (1 - measures["recall"]) / n)
    )
    influences = influence.of_frechet_distance(evaluator.real.pool, rows["pool"])
    assert errors["fd"] == pytest.approx(np.std(influences) / np.sqrt(300))


@pytest.mark.slow
def test_the_first_samples_of_a_seed_are_drawn_and_counted(exp):
    params, bar = tiny.trained().weights(), Bar()
    generator = exp.pipeline.generator()
    first, second = (variants.draw_samples(generator, params, 20, seed, bar) for seed in (0, 1))
    assert bar.total == 40
    assert first[0].shape == second[0].shape == (20, 8, 8, 1)
    assert not np.array_equal(first[0], second[0])
    assert np.bincount(first[1]).tolist() == [2] * 10
    few, labels = variants.draw_samples(generator, params, 5, 0, bar)
    np.testing.assert_array_equal(few, first[0][:5])
    np.testing.assert_array_equal(labels, first[1][:5])
    plain = guidance.only(exp.config.sample.guidances, ())
    unguided, _ = variants.draw_samples(generator, params, 20, 0, bar, guidances=plain)
    assert not np.array_equal(unguided, first[0])


def test_a_run_writes_the_spread_over_seeds_and_all_that_it_hangs_on(exp, judged, tmp_path, capsys):
    trained = tiny.trained()
    record = evaluate.run(exp, trained.copy(tmp_path))
    [file] = (tmp_path / "evaluations").glob("*/results.json")
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert [f.name for f in file.parent.iterdir()] == ["results.json"]
    assert {name: stats["mean"] for name, stats in record["floor"].items()} == judged[1]
    generator, average = exp.pipeline.generator(), trained.weights("0.9")
    drawn = [variants.draw_samples(generator, average, 20, seed, Bar()) for seed in (0, 1)]
    assert record["each"] == [measure(judged, *part) for part in drawn]
    assert record["measures"] == metrics_report.spread(record["each"])
    assert record["measures"]["fd"]["std"] > 0
    share = record["each"][1]["precision"]
    error = record["standard_errors"][1]["precision"]
    assert error == pytest.approx(np.sqrt(share * (1 - share) / 20))
    assert len(record["standard_errors"]) == 2 and "fd" not in record["standard_errors"][0]
    # Two dozen steps: nearer to the digits than noise would be, far from the floor.
    assert record["measures"]["fd"]["mean"] > 2 * record["floor"]["fd"]["mean"]
    settings = record["settings"]
    assert settings["checkpoint_step"] == 24 and record["samples"] == 20
    assert settings["evaluate"] == {"num": 20, "seeds": (0, 1)} and "seed" not in settings
    assert record["rounding"] == "127.5 x + 128, cut"
    assert record["features"]["name"] == "Classifier"
    assert record["reference"]["pictures"] == 1442 and record["k"] == 3
    assert record["network_sha256"] == pytree.digest(average)
    assert set(record["versions"]) >= {"jax", "python"}
    said = capsys.readouterr().out
    assert "95 % intervals of one such set of samples, for this network: label accuracy %" in said
    assert "| held-out data (n = 355) |" in said and "| samples (n = 20) " in said
    assert record["floor_samples"] == 355 and "in_runs_of_the_floor" not in record
    assert record["an_image"]["evaluations"] == 6  # three steps, doubled by CFG
    assert (
        "20 samples for each of 2 seeds with balanced labels of step 24 (ema); Euler 3, "
        "ig 2 on [0, 1], cfg 1.2 on [0, 1], 6 evaluations an image"
    ) in said


@pytest.mark.slow
def test_more_samples_than_were_held_out_are_also_judged_in_runs_of_as_many(tmp_path, capsys):
    changes = {"evaluate.num": 360, "evaluate.seeds": (0,), "sample.batch_size": 120}
    exp, trained = tiny.experiment(changes), tiny.trained()
    record = evaluate.run(exp, trained.copy(tmp_path))
    evaluator, _ = image_evaluator.make_evaluator(exp.config, exp.mesh)
    drawn = variants.draw_samples(exp.pipeline.generator(), trained.weights("0.9"), 360, 0, Bar())
    found = base.compute_in_runs(evaluator, evaluator.extract(drawn[0]), drawn[1], 355)
    in_runs = {name: stats["mean"] for name, stats in record["in_runs_of_the_floor"].items()}
    assert in_runs == pytest.approx(found, rel=1e-6)
    assert in_runs["fd"] != record["measures"]["fd"]["mean"] and record["floor_samples"] == 355
    said = capsys.readouterr().out
    for row in ("held-out data (n = 355)", "samples (n = 360)", "samples (n = 355)"):
        assert f"| {row} " in said


@pytest.mark.slow
def test_samples_that_cannot_be_judged_are_told_in_a_sentence(tmp_path):
    arrays = {
        "float": np.zeros((20, 8, 8, 1), np.float32),
        "large": np.zeros((20, 16, 16, 1), np.uint8),
        "few": np.zeros((3, 8, 8, 1), np.uint8),
    }
    for name, array in arrays.items():
        np.savez(tmp_path / f"{name}.npz", array)
    (tmp_path / "empty").mkdir()
    for name, sentence in {
        "absent.npz": "evaluate.samples = .*absent.npz: cannot be read",
        "empty": "evaluate.samples = .*empty': holds no images",
        "float.npz": "arr_0 is float32 of shape .*; must be images, uint8",
        "few.npz": "3 samples are too few to evaluate",
        "large.npz": r"evaluate.features: images are \[16, 16, 1\]: must have 64 values",
    }.items():
        with pytest.raises(UserError, match=sentence):
            evaluate.run(tiny.experiment({"evaluate.samples": str(tmp_path / name)}), tmp_path)


@pytest.mark.slow
def test_a_run_that_is_done_is_not_done_again(exp, tmp_path, monkeypatch, capsys):
    workdir = tiny.trained().copy(tmp_path)
    record = evaluate.run(exp, workdir)
    first = capsys.readouterr().out
    monkeypatch.setattr(evaluate, "batches_of", None)  # would be called
    assert evaluate.run(exp, workdir) == json.loads(json.dumps(record))
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_samples_of_files_get_the_verdict_of_samples_that_were_drawn(exp, tmp_path, capsys):
    """An archive and a folder of images; what another program may have made."""
    workdir = tiny.trained().copy(tmp_path)
    drawn = evaluate.run(tiny.experiment({"evaluate.seeds": (0,)}), workdir)
    target = sample.run(tiny.experiment({"sample.num": 20}), workdir)
    (target / "notes.txt").write_text("not a sample")
    archive, folder = (
        evaluate.run(tiny.experiment({"evaluate.samples": str(path)}), workdir)
        for path in (target / "samples.npz", target)
    )
    assert archive["measures"] == drawn["measures"]
    without_labels = dict(drawn["measures"])
    del without_labels["accuracy"]
    assert folder["measures"] == without_labels and folder["samples"] == 20
    said = capsys.readouterr().out
    assert "20 samples of" in said
    assert "1 of 21 files are not evaluated: notes.txt" in said


def test_a_damaged_result_is_made_again_and_a_whole_one_is_not(judged, tmp_path, capsys):
    job = evaluate._Evaluation(tmp_path, evaluator=judged[0], settings={"a": (1, 2)}, num=20)
    assert job.done() is None
    spread = {"fd": {"mean": 1.0, "std": 0.5}, "recall": {"mean": 0.5, "std": 0.0}}
    whole = {"measures": spread, "each": [{"fd": 1.0}], "samples": 20, "of": "20 samples"}
    whole |= {"floor": spread, "settings": {"a": [1, 2]}}
    job.folder.mkdir(parents=True)
    job.file.write_text(json.dumps(whole))
    assert job.done() == whole and capsys.readouterr().out == ""
    changes = [{name: value} for name in ("measures", "samples", "of", "settings") for value in BAD]
    changes += [{"floor": {"fd": 1.0}}, {"floor": {"fid": spread["fd"]}}, {"settings": {"a": 1}}]
    changes += [{"measures": {"fd": stats}} for stats in (None, [], {"mean": 1.0}, {"mean": "1"})]
    texts = [json.dumps(whole | change) for change in changes]
    for text in (*texts, "", "[]", "null", "{", "[" * 9999, "\0" * 99, json.dumps(whole)[:-9]):
        job.file.write_text(text)
        assert job.done() is None, text
        assert capsys.readouterr().out == f"{job.file}: is damaged; it is made again\n"
