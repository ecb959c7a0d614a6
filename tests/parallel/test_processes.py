"""Two processes of two devices each, connected as on a cluster, against one process."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.data import loader
from ig_jax.monitoring import metric_writer
from ig_jax.parallel.mesh import local_rows, make_mesh
from ig_jax.programs import evaluate, sample
from ig_jax.training import trainer

pytestmark = pytest.mark.slow
MOVED = 1e-5  # by the order in which four devices sum instead of two, after so many steps


def run_script(story: str, folder) -> None:
    script = [sys.executable, "tests/helpers/two_processes.py", story, str(folder)]
    done = subprocess.run(script, cwd=tiny.ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("processes")
    run_script("trained", target)
    return target


@pytest.fixture(scope="module")
def seen(folder):
    return json.loads((folder / "seen.json").read_text())


def losses(workdir) -> np.ndarray:
    lines = metric_writer.read_metrics(workdir)
    return np.array([[m["step"], m["loss"], m["grad_norm"]] for m in lines])


def test_metrics_tell_of_every_process(folder):
    for line in metric_writer.read_metrics(folder / "run")[:2]:
        for process in (0, 1):
            assert line[f"memory_gib/process_{process}"] > 0
            assert 0 <= line[f"seconds/data/process_{process}"] < line["seconds/step"] + 1


def test_samples_of_two_processes_are_those_of_one(folder, tmp_path):
    """The folder's name tells the settings: it is the same."""
    workdir = folder / "run"
    [made] = (workdir / "samples").iterdir()
    assert sorted(os.listdir(made)) == sorted(
        [*(f"{i:06d}.png" for i in range(12)), "grid.png", "samples.npz", "settings.json"]
    )
    again = sample.run(tiny.experiment(), _without_samples(workdir, tmp_path))
    for i in range(12):
        ours, alone = (np.asarray(Image.open(f / f"{i:06d}.png"), int) for f in (made, again))
        assert np.abs(ours - alone).max() <= 1  # a grey level, by rounding
    with np.load(made / "samples.npz") as a, np.load(again / "samples.npz") as b:
        np.testing.assert_array_equal(a["arr_1"], b["arr_1"])


def _without_samples(workdir, target):
    os.symlink(workdir / "checkpoints", target / "checkpoints")
    return target


@pytest.mark.slow
def test_two_processes_judge_the_samples_of_both(folder):
    run_script("judged", folder)
    [file] = (folder / "run" / "evaluations").glob("*/results.json")
    record = json.loads(file.read_text())
    file.unlink()
    alone = evaluate.run(tiny.experiment(), folder / "run")
    for name, stats in alone["measures"].items():
        assert record["measures"][name]["mean"] == pytest.approx(stats["mean"], rel=0.01), name


def test_when_one_process_is_killed_the_other_ends_soon_and_says_why(seen):
    """The script looks for the sentence on its standard error."""
    assert seen["status"] == 75


@pytest.fixture(scope="module")
def alone(seen, tmp_path_factory):
    """One process that was left alone, to the same step."""
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, trainer.run(tiny.experiment({"train.steps": seen["end"]}), workdir)


def test_two_processes_killed_stopped_and_gone_on_as_one_have_the_losses_of_one(
    folder, seen, alone
):
    """Two processes, one of them killed; two again, stopped by a signal to one; then one."""
    assert 12 <= seen["stopped_at"] < seen["end"]
    ours, theirs = losses(folder / "run"), losses(alone[0])
    # Lines every 6 steps and at the end, whatever happened: no step is missing or told twice.
    assert ours[:, 0].tolist() == sorted({*range(6, seen["end"] + 1, 6), seen["end"]})
    # But for the line that has only the steps since a stop off the grid of lines.
    whole = [i for i, step in enumerate(ours[:, 0]) if not 0 < step - seen["stopped_at"] < 6]
    assert len(whole) >= 2
    np.testing.assert_allclose(ours[whole], theirs[whole], rtol=MOVED)


def test_they_end_with_the_parameters_of_one(folder, seen, alone):
    checkpoints = Checkpoints(folder / "run", reading=True)
    state = checkpoints.restore(seen["end"], tiny.experiment().abstract_state)
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone[1].state), strict=True):
        np.testing.assert_allclose(a, b, rtol=MOVED, atol=1e-4)


def test_the_order_of_the_data_goes_on_whoever_reads_it(folder, seen):
    checkpoints = Checkpoints(folder / "run")
    for step in checkpoints.all_steps():
        assert checkpoints.meta(step)["data"]["examples"] == 16 * step
    checkpoints.close()
    c = tiny.experiment().config
    whole = loader.batches(c.data.source, 16, c.seed, start=16 * seen["stopped_at"])
    batch = next(whole)["label"]
    rows = [np.arange(8), np.arange(8, 16)]
    parts = [
        loader.batches(c.data.source, 16, c.seed, start=16 * seen["stopped_at"], rows=r)
        for r in rows
    ]
    np.testing.assert_array_equal(np.concatenate([next(p)["label"] for p in parts]), batch)


def test_rows_of_this_process_are_all_of_them_where_it_is_alone():
    mesh = make_mesh()
    np.testing.assert_array_equal(local_rows(mesh, 6), np.arange(6))
