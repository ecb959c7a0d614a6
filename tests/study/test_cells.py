"""Cells of a study: each trained and measured once, whatever kills it, whoever else works there."""

import json
import shutil
import threading
from contextlib import ExitStack

import jax
import numpy as np
import pytest
import studies
from runs import assert_same_bits

from ig_jax.errors import UserError
from ig_jax.monitoring.throughput import NonFiniteLoss
from ig_jax.parallel import lock
from ig_jax.study import cells as of_study
from ig_jax.study import methods, probe
from ig_jax.study.measures import Bench, weights
from ig_jax.training import trainer

pytestmark = pytest.mark.slow

SEEDS = (3, 1)
ALL = [(m, s) for m in ("plain", "sra2", "guided") for s in SEEDS]


class Killed(BaseException):
    """Nothing below catches it: as if the process had ended."""


@pytest.fixture(scope="module")
def programs():
    return []


@pytest.fixture(scope="module")
def done(tmp_path_factory, programs):
    """The folder of a study that came to its end; its training programs are in `programs`."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        make = of_study.SeededPrograms
        patch.setattr(
            of_study, "SeededPrograms", lambda exp: programs.append(make(exp)) or programs[-1]
        )
        studies.cells(folder).fill()
    return folder


@pytest.fixture
def folder(done, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(done, tmp_path / "copy")


@pytest.fixture
def measured(monkeypatch):
    """(method, seed) of everything that is measured from here on."""
    found, measure = [], Bench.measure

    def noting(self, row, seed, *arguments):
        found.append((row.name, seed))
        return measure(self, row, seed, *arguments)

    monkeypatch.setattr(Bench, "measure", noting)
    return found


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(trainer, "run", lambda *a: pytest.fail("trained again"))


def cell(folder, method, seed):
    return folder / "cells" / method / f"seed_{seed}"


def row(folder, method, seed):
    return (cell(folder, method, seed) / "row.json").read_bytes()


def remove_rows(folder):
    for method, seed in ALL:
        (cell(folder, method, seed) / "row.json").unlink()


def final(folder, method, seed):
    exp = studies.cells(folder)._rows[method].of_seed(seed)
    return weights(exp, cell(folder, method, seed), 8, "raw")


def test_every_cell_is_there_and_runs_differ_by_method_and_seed(done):
    rows = studies.cells(done).rows()
    assert list(rows) == ["plain", "sra2", "guided"]
    losses = {name: [run["loss"] for run in runs] for name, runs in rows.items()}
    assert losses["guided"] == losses["plain"]  # one run, and a loss knows no guidance
    assert len({*losses["plain"], *losses["sra2"]}) == 4
    assert rows["guided"][0]["train_flops"] == rows["plain"][0]["train_flops"]
    assert rows["sra2"][0]["train_flops"] > rows["plain"][0]["train_flops"]
    assert not (cell(done, "guided", 3) / "checkpoints").exists()


def test_seeds_share_the_compiled_program_of_their_method(done, programs):
    # Two methods have runs of their own, and every dispatch does four steps.
    assert [p.dispatch._cache_size() for p in programs] == [1, 1]
    assert [p.init._cache_size() for p in programs] == [1, 1]


def test_a_run_is_bit_for_bit_what_training_it_alone_gives(done, tmp_path):
    exp = studies.cells(done)._rows["plain"].of_seed(3)
    outcome = trainer.run(exp, tmp_path)
    assert_same_bits(
        jax.tree.map(np.asarray, outcome.state.params),
        jax.tree.map(np.asarray, final(done, "plain", 3)),
    )


def test_a_finished_study_computes_nothing_again(folder, measured, no_training):
    studies.cells(folder).fill()
    assert measured == []


def test_a_new_method_or_seed_costs_its_own_cells_alone(folder, measured, no_training):
    more = {**studies.METHODS, "again": {"same_run_as": "sra2"}}
    studies.cells(folder, methods=more).fill()
    assert measured == [("again", 3), ("again", 1)]
    assert list(studies.cells(folder, methods=more).rows()) == ["plain", "sra2", "again", "guided"]


def test_a_changed_method_is_refused_by_the_name_of_its_cell(folder, measured, no_training):
    changed = {**studies.METHODS, "sra2": {"overrides": {"optim": {"learning_rate": 0.004}}}}
    with pytest.raises(UserError) as caught:
        studies.cells(folder, methods=changed).fill()
    message = str(caught.value)
    assert message.startswith(f"{cell(folder, 'sra2', 3)}: holds sra2 under seed 3 with other")
    assert "optim.learning_rate: 0.003 there, 0.004 here" in message and "\n" not in message
    assert measured == []


@pytest.mark.parametrize("length", [{"train.steps": 12}, {"evaluate.num": 30}])
def test_a_changed_config_is_refused(folder, length, no_training):
    with pytest.raises(UserError, match="plain under seed 3 with other settings"):
        exp = studies.experiment(studies.settings(length))
        rows = methods.rows(exp, exp.config.study, folder)
        of_study.Cells(folder, rows, SEEDS, Bench(exp, ("loss",), exp.config.study.probe)).fill()


def test_a_study_killed_within_a_run_and_between_cells_ends_with_the_same_bits(
    done, folder, monkeypatch
):
    for seed in SEEDS:
        shutil.rmtree(cell(folder, "sra2", seed))
    dispatch, calls = trainer.Trainer._advance, []

    def dying(self, *arguments):
        calls.append(self.step)
        if calls == [0, 4]:  # behind the save at step 4
            raise Killed
        dispatch(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_advance", dying)
    with pytest.raises(Killed):
        studies.cells(folder).fill()
    assert (cell(folder, "sra2", 3) / "checkpoints" / "4").is_dir()
    assert not (cell(folder, "sra2", 3) / "trained.json").exists()
    monkeypatch.setattr(Bench, "measure", lambda *a: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        studies.cells(folder).fill()
    assert (cell(folder, "sra2", 3) / "trained.json").exists()
    monkeypatch.undo()
    studies.cells(folder).fill()
    for seed in SEEDS:
        assert row(folder, "sra2", seed) == row(done, "sra2", seed)
        assert_same_bits(final(folder, "sra2", seed), final(done, "sra2", seed))


def test_a_cell_in_use_is_left_out_and_tried_again_at_the_end(
    done, folder, measured, no_training, monkeypatch
):
    remove_rows(folder)
    with ExitStack() as other:
        other.enter_context(lock.held(cell(folder, "plain", 3), of_study.LOCK))
        monkeypatch.setattr(of_study.time, "sleep", lambda seconds: other.close())
        studies.cells(folder).fill()
    assert measured == [*ALL[1:], ALL[0]]
    assert all(row(folder, *each) == row(done, *each) for each in ALL)


def test_two_that_work_in_one_folder_share_its_cells(done, folder, measured, monkeypatch):
    """Two threads: a lock keeps out whoever has not the same open file, of any process."""
    monkeypatch.setattr(of_study, "WAIT", 0.05)
    remove_rows(folder)
    shutil.rmtree(cell(folder, "plain", 1))
    workers = [threading.Thread(target=studies.cells(folder).fill) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(measured) == sorted(ALL)
    assert all(row(folder, *each) == row(done, *each) for each in ALL)


def test_a_run_that_diverges_is_named_when_all_others_are_done(folder, monkeypatch):
    for seed in SEEDS:
        shutil.rmtree(cell(folder, "sra2", seed))
    remaining = {"plain": 2, "guided": 2, "sra2": 1}
    run = trainer.run

    def diverging(exp, workdir, *rest):
        if exp.config.seed == 3:
            raise NonFiniteLoss(float("nan"), 7)
        return run(exp, workdir, *rest)

    monkeypatch.setattr(trainer, "run", diverging)
    with pytest.raises(UserError, match="^sra2, seed 3: the loss is nan at step 7"):
        studies.cells(folder).fill()
    there = {m: sum((cell(folder, m, s) / "row.json").exists() for s in SEEDS) for m in remaining}
    assert there == remaining


def test_a_run_starts_from_the_one_of_the_same_seed(folder, monkeypatch):
    starts = []

    def noting(exp, workdir, start, programs):
        starts.append((workdir, start))
        raise NonFiniteLoss(0.0, 1)

    monkeypatch.setattr(trainer, "run", noting)
    more = {**studies.METHODS, "later": {"init_from": "sra2"}}
    with pytest.raises(UserError, match="later, seed 3: .*; later, seed 1: "):
        studies.cells(folder, methods=more).fill()
    assert starts == [(cell(folder, "later", s), str(cell(folder, "sra2", s))) for s in SEEDS]


def test_a_measure_that_is_asked_for_later_is_taken_without_training(
    folder, measured, no_training, monkeypatch
):
    monkeypatch.setattr(probe, "accuracy", lambda *a: {"probe_2_0.1": 0.625})
    asked = {"measures": ("loss", "probe"), "probe": {"blocks": (2,), "time": 0.1}}
    studies.cells(folder, **asked).fill()
    assert measured == ALL
    runs = studies.cells(folder, **asked).rows()["plain"]
    assert all(run["probe_2_0.1"] == 0.625 for run in runs)
    assert json.loads(row(folder, "plain", 3))["measures"].keys() == {"loss", "probe_2_0.1"}
