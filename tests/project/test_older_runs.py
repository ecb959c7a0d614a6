"""A run, samples, an evaluation and latents that an older version made are gone on with and read.

tests/golden/e1b32a4.tar.xz was written by the program at commit e1b32a4 (and jax 0.10.2): twelve
steps of tests/helpers/tiny.py with a checkpoint, its samples and its evaluation, the metrics of the
same run unbroken to step 24, and latents prepared from .npy files.
"""

import json
import shutil
import tarfile

import jax
import numpy as np
import pytest
import tiny

import ig_jax
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.data.sources.array_record import ArrayRecord
from ig_jax.monitoring import metric_writer
from ig_jax.programs import evaluate, export_checkpoint, sample
from ig_jax.training import trainer

SETTINGS = {"train.steps": 12, "train.ema_decays": (0.9, 0.99)}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(tiny.ROOT / "tests" / "golden" / "e1b32a4.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "e1b32a4"


@pytest.mark.slow
def test_training_resumes_and_follows_the_unbroken_run(older, tmp_path):
    workdir = shutil.copytree(older / "run", tmp_path / "run")
    outcome = trainer.run(tiny.experiment({**SETTINGS, "train.steps": 24}), workdir)
    assert outcome.step == 24 and outcome.finished
    found = metric_writer.read_metrics(workdir)
    lines = (older / "unbroken_metrics.jsonl").read_text().splitlines()
    expected = list(map(json.loads, lines))
    assert [m["step"] for m in found] == [m["step"] for m in expected] == [6, 12, 18, 24]
    compared = [name for name in expected[0] if name.startswith("loss") or name == "grad_norm"]
    assert len(compared) > 10
    for ours, theirs in zip(found, expected, strict=True):
        for name in set(compared) & theirs.keys():
            # Another processor rounds otherwise; another batch, noise or average is far off.
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-4), name


@pytest.mark.slow
def test_samples_are_found_again_and_would_be_the_same(older, monkeypatch):
    exp = tiny.experiment(SETTINGS)
    [folder] = (older / "run" / "samples").iterdir()
    old = np.load(folder / "samples.npz")["arr_0"]
    monkeypatch.setattr(sample, "sample_batches", lambda *a, **k: iter(()))  # nothing is missing
    assert sample.run(exp, older / "run") == folder
    pipe = ig_jax.load(older / "run")
    labels = np.load(folder / "samples.npz")["arr_1"]
    again = pipe.sample(labels=labels, seed=0)
    assert np.abs(again.astype(int) - old).max() <= 1


def test_an_evaluation_is_found_again(older, monkeypatch):
    [folder] = (older / "run" / "evaluations").iterdir()
    expected = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr(evaluate, "batches_of", None)  # would be called
    assert evaluate.run(tiny.experiment(SETTINGS), older / "run") == expected


def test_a_checkpoint_exports(older, tmp_path):
    export_checkpoint.export_checkpoint(older / "run", tmp_path / "x.safetensors", "raw")
    found = ig_jax.load(tmp_path / "x.safetensors")
    checkpoints = checkpoint_manager.of_run(older / "run", "--workdir")
    step, like = checkpoints.latest_step(), tiny.experiment(SETTINGS).replicated_params
    raw = checkpoints.weights(step, "raw", like)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, found.params, raw)


def test_prepared_latents_are_read(older):
    source = ArrayRecord(str(older / "latents"), "train", 3)
    batch = source.batch(np.arange(6))
    expected = np.random.default_rng(0).normal(size=(6, 8, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(batch["stored"], expected.transpose(0, 2, 3, 1))
    assert batch["label"].tolist() == [0, 1, 2, 0, 1, 2]
    assert source.record().examples == 6 and source.codec == "sd_vae"
