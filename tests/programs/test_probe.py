"""--mode=probe on the tiny run: what it writes, that it goes on, what it refuses."""

import json
from dataclasses import replace
from types import MappingProxyType

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from ig_jax import modes
from ig_jax.data.sources.digits import Digits
from ig_jax.errors import UserError
from ig_jax.evaluation import probing
from ig_jax.evaluation.pooled_features import features_at, inputs_of
from ig_jax.parallel.mesh import to_global
from ig_jax.programs import probe as probe_mode

FEW = {
    "probe.times": (0.3, 0.1),
    "probe.epochs": 1.0,
    "probe.batch_size": 144,
    "probe.neighbours": 5,
    "probe.bank": 200,
    "sample.weights": "0.8",
}


def probe(workdir, changes=MappingProxyType({})):
    return modes.run(tiny.settings(FEW | changes), workdir=workdir, mode="probe")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The record, and the folder that it lies in."""
    workdir = tiny.trained().copy(tmp_path_factory.mktemp("run"))
    record = probe(workdir)
    [folder] = (workdir / "probes").iterdir()
    return record, folder


def test_a_table_a_map_and_all_numbers_are_written(found):
    record, folder = found
    assert folder.name.startswith("step24-0.8-")
    assert sorted(f.name for f in folder.iterdir()) == ["map.png", "results.json", "table.md"]
    assert json.loads((folder / "results.json").read_text()) == record
    grid = np.array(record["validation_accuracy"])
    assert grid.shape == (2, 2) and record["times"] == [0.3, 0.1] and record["blocks"] == [1, 2]
    i, j = np.unravel_index(grid.argmax(), grid.shape)
    assert (record["time"], record["block"]) == (record["times"][i], record["blocks"][j])
    assert record["validation"]["images"] == 288 and record["trained_on"] == 1154
    assert record["validation"]["accuracy"] == grid.max()
    assert record["test"]["images"] == record["nearest_neighbours"]["images"] == 355
    low, high = record["test"]["interval_95"]
    assert 0 <= low < record["test"]["accuracy"] < high < 1
    assert record["settings"]["weights"] == "0.8" and record["settings"]["checkpoint_step"] == 24
    table = (folder / "table.md").read_text()
    assert "| block | t = 0.3 | t = 0.1 |" in table and "n = 355" in table
    with Image.open(folder / "map.png") as image:
        assert image.width > 600 and np.ptp(np.asarray(image.convert("L"))) > 200


def test_what_is_done_is_not_done_again(found, monkeypatch, capsys):
    record, folder = found
    monkeypatch.setattr(probing, "probe", lambda *a: pytest.fail("probed again"))
    assert probe(folder.parents[1], {"probe.save_every_steps": 7}) == record
    assert "Best cell: block" in capsys.readouterr().out


@pytest.mark.slow
def test_features_are_those_of_the_python_api():
    """Without noise, at t = 0; pooled over the tokens."""
    exp = tiny.experiment(FEW | {"probe.times": (0.0,)})
    pipeline = replace(exp.pipeline, params=tiny.trained().weights("0.8"))
    images = Digits("train").batch(np.array([5, 900, 33, 2]))
    rows = {
        "stored": jax.numpy.asarray(images["stored"]),
        "label": jax.numpy.asarray(images["label"]),
        "number": jax.numpy.arange(4),
    }
    tokens = pipeline.features(images["stored"], 0.0, (2,))[2]
    told = pipeline.features(images["stored"], 0.0, (2,), images["label"])[2]
    for changes, expected in (
        ({}, np.mean(tokens, axis=1)),
        ({"pooling": "max"}, np.max(tokens, axis=1)),
        ({"labels": "true"}, np.mean(told, axis=1)),
    ):
        settings = replace(exp.config.probe, **changes)
        seen = features_at(pipeline, settings, exp.local_mesh)((0.0,), (2,))
        inputs = inputs_of(pipeline, (8, 8, 1), exp.local_mesh)
        found = jax.jit(seen)(inputs, rows, jax.numpy.int32(0))
        np.testing.assert_allclose(found, expected[None, None], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_two_devices_see_what_one_does():
    """Noise and flips of training included."""
    images = Digits("train").batch(np.array([5, 900, 33, 2]))
    seen = []
    for devices in (jax.devices()[:1], jax.devices()[:2]):
        exp = tiny.experiment({**FEW, "probe.flip": True}, devices)
        params = jax.device_put(jax.device_get(tiny.trained().weights("0.8")), devices[0])
        pipeline = replace(exp.pipeline, params=params)
        of_grid = features_at(pipeline, exp.config.probe, exp.local_mesh)((0.3, 0.1), (1, 2))
        inputs = inputs_of(pipeline, (8, 8, 1), exp.local_mesh)
        rows = to_global({**images, "number": np.arange(4, dtype=np.int32)}, exp.local_mesh, 4)
        program = jax.jit(of_grid)
        steps = map(jax.numpy.int32, range(3))
        seen.append([np.asarray(program(inputs, rows, step)) for step in steps])
    np.testing.assert_allclose(*seen, rtol=0, atol=2e-5)
    # Other noise in every step, and mirror images in some.
    assert np.abs(seen[0][1] - seen[0][2]).max() > 1e-2


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"probe.times": ()}, r"probe.times = \(\): needs 1 to 16 times in \[0, 1\]"),
        ({"probe.times": (0.1, 0.1)}, r"probe.times = \(0.1, 0.1\): needs 1 to 16 .* each once"),
        ({"probe.times": (1.5,)}, r"probe.times = \(1.5,\): needs 1 to 16 times in \[0, 1\]"),
        ({"probe.blocks": (3,)}, r"probe.blocks = \(3,\): must lie in 1..2, the model's depth"),
        ({"probe.blocks": (0,)}, r"probe.blocks = \(0,\): must be numbers of blocks from 1"),
        ({"probe.blocks": (1, 1)}, r"probe.blocks = \(1, 1\): must be .* each once"),
        ({"probe.labels": "some"}, "probe.labels = 'some': must be null or true"),
        ({"probe.pooling": "cls"}, "probe.pooling = 'cls': must be mean or max"),
        ({"probe.norm": "layer"}, "probe.norm = 'layer': must be none or batch"),
        ({"probe.epochs": 0.0}, "probe.epochs = 0.0: must be above 0"),
        ({"probe.learning_rate": -1.0}, "probe.learning_rate = -1.0: must be above 0"),
        ({"probe.weight_decay": -1.0}, "probe.weight_decay = -1.0: must not be negative"),
        ({"probe.batch_size": 0}, "probe.batch_size = 0: must be at least 1"),
        ({"probe.save_every_steps": 0}, "probe.save_every_steps = 0: must be at least 1"),
        ({"probe.validation_share": 0.6}, r"probe.validation_share = 0.6: must lie in \(0, 0.5\]"),
        ({"probe.neighbours": -1}, "probe.neighbours = -1: must not be negative"),
        ({"probe.bank": 0}, "probe.bank = 0: must be at least 1"),
        ({"probe.seed": -1}, "probe.seed = -1: must not be negative"),
        ({"probe.test_path": "val"}, "probe.test_path = 'val': data.source.name = 'digits' has no"),
        (
            {"objective.label_drop": 0.0, "sample.cfg.scale": 1.0},
            "probe.labels = 'null': this network was trained without a null class; set it to 'true",
        ),
        (
            {
                "data.source": {
                    **{"name": "synthetic", "side": 8, "channels": 1},
                    **{"num_classes": 1, "size": 40},
                },
                "data.codec": {"name": "as_stored"},
                "sample.labels": "random",
            },
            "data.source.num_classes = 1: a probe needs images of two classes",
        ),
        ({"model.hidden_size": 32}, "hidden_size"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        probe(tiny.trained().copy(tmp_path / "run"), changes)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        probe(tmp_path)


def test_another_split_is_the_test_set_and_none_is_told(capsys):
    exp = tiny.experiment({**FEW, "probe.test_split": "held_out"})
    assert probe_mode._test(exp) == Digits("held_out") == probe_mode._test(tiny.experiment(FEW))
    assert capsys.readouterr().out == ""
    without = {"data.source.split": "held_out"}
    assert probe_mode._test(tiny.experiment({**FEW, **without})) is None
    assert "no test set: name it in probe.test_path" in capsys.readouterr().out
