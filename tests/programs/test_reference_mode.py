"""--mode=reference: statistics of real images, however often it broke off, and what uses them."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from PIL import Image
from readme import example

from ig_jax import modes
from ig_jax.errors import UserError
from ig_jax.evaluation import image_evaluator
from ig_jax.evaluation.encoders import all_of, make_encoders
from ig_jax.evaluation.feature_extractor import FeatureExtractor
from ig_jax.metrics import FEATURES
from ig_jax.metrics import reference_statistics as statistics
from ig_jax.metrics.moments import Moments
from ig_jax.programs import evaluate, reference


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    reference.run(tiny.experiment(), folder)
    return folder


def test_it_holds_moments_and_features_of_every_digit(made):
    found = statistics.read(made / "reference.npz", "evaluate.reference")
    encoders = tiny.made_for(make_encoders, tiny.experiment())
    images, _ = all_of(tiny.experiment().config.data.source)
    rows = encoders(images)["pool"].astype(np.float64)
    np.testing.assert_allclose(found.pool.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.pool.covariance, np.cov(rows.T), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.rows, rows)  # fewer than are chosen of a larger set
    assert found.space == encoders.first.digest and found.spatial is None and found.images is None
    assert [f.name for f in made.iterdir()] == ["reference.npz"]
    with np.load(made / "reference.npz") as arrays:
        assert int(arrays["count"]) == len(images)


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "PART", 400)
    monkeypatch.setattr(reference, "CHOSEN", 100)
    exp = tiny.experiment()
    (tmp_path / "unbroken").mkdir()
    unbroken = reference.run(exp, tmp_path / "unbroken").read_bytes()
    write, parts = reference._write_part, []

    def breaks(file, found, kept):
        if len(parts) == 2:
            parts.append("broken")
            raise KeyboardInterrupt
        parts.append(file.name[-9:-4])
        write(file, found, kept)

    monkeypatch.setattr(reference, "_write_part", breaks)
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(KeyboardInterrupt):
        reference.run(exp, broken)
    [first] = (broken / ".parts").glob("*-00000.npz")
    first.write_bytes(first.read_bytes()[:-100])  # a damaged part is made again
    assert reference.run(exp, broken).read_bytes() == unbroken
    assert parts == ["00000", "00001", "broken", "00000", "00002", "00003"]
    (broken / "reference.npz").write_bytes(b"")  # and so is the whole
    assert reference.run(exp, broken).read_bytes() == unbroken
    in_parts = statistics.read(broken / "reference.npz", "")
    at_once = statistics.read(made / "reference.npz", "")
    np.testing.assert_allclose(in_parts.pool.covariance, at_once.pool.covariance, rtol=1e-9, atol=0)
    chosen = np.random.default_rng(0).permutation(len(at_once.rows))[:100]
    np.testing.assert_array_equal(in_parts.rows, at_once.rows[np.sort(chosen)])


@pytest.mark.slow
def test_samples_are_judged_by_the_file_as_by_the_pictures(made, tmp_path):
    plain = evaluate.run(tiny.experiment(), tiny.trained().copy(tmp_path))
    changes = {"evaluate.reference": str(made / "reference.npz")}
    by_file = evaluate.run(tiny.experiment(changes), tmp_path)
    assert by_file["measures"].keys() == plain["measures"].keys()
    for name, stats in plain["measures"].items():
        assert by_file["measures"][name]["mean"] == pytest.approx(stats["mean"], rel=1e-9), name
    assert by_file["reference"]["pictures_of_precision_and_recall"] == 1442
    assert len(by_file["reference"]["sha256"]) == 64
    assert len(list((tmp_path / "evaluations").iterdir())) == 2


def test_statistics_of_another_feature_space_are_refused(made, tmp_path):
    """Held-out digits fit another classifier."""
    changes = {"evaluate.reference": str(made / "reference.npz"), "data.source.split": "held_out"}
    with pytest.raises(UserError, match="made with other weights of the feature space"):
        tiny.made_for(image_evaluator.make_evaluator, tiny.experiment(changes))


def test_statistics_of_other_features_are_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    np.savez(tmp_path / "dino.npz", mu=np.zeros(1024), sigma=np.eye(1024))
    exp = tiny.experiment({"evaluate.reference": str(tmp_path / "dino.npz")})
    workdir = tiny.trained().copy(tmp_path / "run")
    monkeypatch.setattr(evaluate, "batches_of", None)  # would be called
    sentence = "evaluate.reference = '.*dino.npz': is of features with 1024 numbers, but Classifier"
    with pytest.raises(UserError, match=sentence):
        evaluate.run(exp, workdir)


def test_real_pictures_are_looked_at_once_and_not_before_it_is_needed(monkeypatch):
    """Ten thousand of them: too many for an evaluation that is done already."""
    images = np.zeros((30, 8, 8, 1), np.uint8)
    gaussian = Moments.from_features(np.eye(128)).gaussian
    file = statistics.Reference(gaussian, None, None, images, "", "digest")
    monkeypatch.setattr(statistics, "read", lambda *which: file)
    exp = tiny.experiment({"evaluate.reference": "adm.npz"})
    encoder = make_encoders(exp.config, exp.mesh).first
    seen, whole = [], FeatureExtractor.__call__
    monkeypatch.setattr(
        FeatureExtractor, "__call__", lambda s, x: (seen.append(len(x)), whole(s, x))[1]
    )
    real = image_evaluator._from_file(
        Path(exp.config.evaluate.reference), encoder, "evaluate.reference"
    )
    assert seen == [] and real.record["pictures_of_precision_and_recall"] == 30
    assert real.rows().shape == real.rows().shape == (30, 128)
    assert seen == [30]


def test_statistics_are_not_taken_of_latents(tmp_path):
    source = {"name": "synthetic", "side": 8, "channels": 1, "num_classes": 10, "size": 9}
    changes = {"data.source": source, "data.codec": {"name": "as_stored"}}
    with pytest.raises(UserError, match="data.source: holds latents; statistics are taken of"):
        reference.run(tiny.experiment(changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_feature_space_of_the_readme_judges(monkeypatch, tmp_path):
    """It has neither logits nor spatial features, and is not fitted on the digits."""
    monkeypatch.setitem(FEATURES, "thumbnails", example("Thumbnails"))
    settings = tiny.settings({"evaluate.features": {"name": "thumbnails", "side": 2}})
    modes.run(settings, workdir=str(tmp_path / "real"), mode="reference")
    settings.evaluate.reference = str(tmp_path / "real" / "reference.npz")
    workdir = tiny.trained().copy(tmp_path / "run")
    record = modes.run(settings, workdir=str(workdir), mode="evaluate")
    assert set(record["measures"]) == {"fd", "precision", "recall"}
    assert record["features"]["name"] == "Thumbnails"
    assert record["floor"]["fd"]["mean"] < record["measures"]["fd"]["mean"]
    settings.search = ConfigDict(
        {
            **settings.search.to_dict(),
            **{"metric": "fd", "num": 20, "rounds": 1},
            "space": {"method": "grid", "candidates": 2, "values": {"ig": {"scale": (1.0, 2.0)}}},
        }
    )
    rows = modes.run(settings, workdir=str(workdir), mode="search")
    assert json.loads((workdir / "search.json").read_text()) and rows[0]["fd"]["mean"] >= 0


@pytest.mark.parametrize("labelled", [False, True])
def test_statistics_need_no_classes(monkeypatch, tmp_path, capsys, labelled):
    """The config may be that of a network with ten; the folder has one, or none."""
    monkeypatch.setitem(FEATURES, "thumbnails", example("Thumbnails"))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    folder = tmp_path / "real"
    (folder / "all").mkdir(parents=True)
    for i, image in enumerate(pixels):
        name = f"all/{i:02d}.png" if labelled else f"{i:02d}.png"
        Image.fromarray(image).save(folder / name)
    source = {"name": "image_folder", "path": str(folder), "size": 8, "num_classes": 10}
    changes = {"data.source": source, "evaluate.features": {"name": "thumbnails", "side": 2}}
    target = reference.run(tiny.experiment(changes), tmp_path)
    rows = statistics.read(target, "").rows
    found = tiny.made_for(make_encoders, tiny.experiment(changes))(pixels)["pool"]
    np.testing.assert_array_equal(rows, found)
    assert f"data: 12 images, no classes, in {folder}\n" in capsys.readouterr().out
