"""The loop around the training step: when it holds, what it refuses, how it stops."""

import os
import shutil
import signal
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from ig_jax import modes
from ig_jax.errors import UserError
from ig_jax.monitoring import metric_writer
from ig_jax.monitoring.throughput import NonFiniteLoss
from ig_jax.parallel import lock
from ig_jax.parallel.preemption import SIGNALS, Stopped, StopSignal
from ig_jax.programs import evaluate
from ig_jax.training import step as training_step
from ig_jax.training import trainer as train
from ig_jax.training.held_out_loss import HeldOutLoss


def boundaries(start: int, per_dispatch: int, every: list[int], total: int) -> list[int]:
    """Steps at which a run from `start` hands over to the host."""
    steps = [start]
    while (step := steps[-1]) < total:
        holds = [(step // n + 1) * n for n in every]
        steps.append(step + train.steps_until(step, per_dispatch, total, *holds))
    return steps


EVENTS = [
    (k, every, total) for k in (1, 3, 4) for every in ([6], [5, 7], [2, 9]) for total in (24, 25)
]


@pytest.mark.parametrize(("per_dispatch", "every", "total"), EVENTS)
def test_the_loop_holds_at_every_event(per_dispatch, every, total):
    held = boundaries(0, per_dispatch, every, total)
    events = {s for n in every for s in range(n, total + 1, n)}
    assert events | {total} <= set(held)


@pytest.mark.parametrize(("per_dispatch", "every", "total"), EVENTS)
def test_which_steps_share_a_program_depends_on_the_step_alone(per_dispatch, every, total):
    held = boundaries(0, per_dispatch, every, total)
    for start in held:
        assert boundaries(start, per_dispatch, every, total) == held[held.index(start) :]
    assert {b - a for a, b in zip(held, held[1:], strict=False)} <= {1, per_dispatch}


def test_programs_are_as_long_as_asked_where_nothing_is_near():
    assert boundaries(0, 4, [6], 18) == [0, 4, 5, 6, 7, 8, 12, 16, 17, 18]


@pytest.fixture
def workdir(tmp_path):
    """The tiny run at step 18 of 24."""
    tiny.trained().copy(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "24")
    return tmp_path


@pytest.fixture
def trainer(workdir):
    """About to go on from step 18; nothing is logged before the end."""
    trainer = train.Trainer(tiny.experiment({"log.every_steps": 1000}), workdir)
    assert trainer.step == 18
    yield trainer
    trainer.close()


@pytest.mark.slow
def test_an_implicit_transfer_in_the_loop_raises(trainer):
    dispatch = trainer.dispatch
    trainer.dispatch = lambda state, batches, encoder: dispatch(
        state, jax.tree.map(np.asarray, batches), encoder
    )
    with pytest.raises(Exception, match="Disallowed (host-to-device|device-to-host) transfer"):
        trainer.run()


@pytest.mark.parametrize(
    ("bad_step", "value"),
    [
        (19, np.inf),
        pytest.param(23, np.nan, marks=pytest.mark.slow),
        pytest.param(24, np.nan, marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_no_number_stops_at_its_step_and_is_never_saved(trainer, bad_step, value):
    dispatch = trainer.dispatch

    def poisoned(state, batches, encoder):
        first = trainer.step + 1
        state, metrics = dispatch(state, batches, encoder)
        loss = np.array(metrics["loss"].total)
        loss[np.arange(first, first + len(loss)) == bad_step] = value
        return state, {**metrics, "loss": metrics["loss"].replace(total=jax.device_put(loss))}

    trainer.dispatch = poisoned
    with pytest.raises(NonFiniteLoss, match=rf"the loss is {value} at step {bad_step}: .*lower"):
        trainer.run()
    trainer.checkpoints.wait()
    assert trainer.checkpoints.latest_step() == 18


@pytest.mark.slow
def test_a_run_that_diverges_says_what_is_accepted_next(tmp_path):
    """A lower learning rate, from the last checkpoint before the loss was none."""
    short = {"train.steps": 3, "checkpoint.every_steps": 1}
    with pytest.raises(NonFiniteLoss, match="lower optim.learning_rate and go on .* another --wor"):
        train.run(tiny.experiment({**short, "optim.learning_rate": 1e30}), tmp_path)
    lower = tiny.experiment({**short, "optim.learning_rate": 1e-3})
    trainer = train.Trainer(lower, tmp_path)
    trainer.close()
    assert trainer.step == 1


@pytest.fixture
def interruptible():
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_a_stop_signal_is_noted_once_and_then_obeyed(interruptible, capfd):
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
        assert capfd.readouterr().err == "\nSIGINT: stopping after this step; again to abort\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is interruptible


def test_elsewhere_than_in_the_main_thread_no_signal_is_caught():
    seen = []

    def other():
        with StopSignal() as stop:
            seen.append((stop.before(0), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


def test_handlers_are_back_after_an_error_even_those_that_are_not_python_s(monkeypatch):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(KeyError), StopSignal():
        assert all(signal.getsignal(number) != before[number] for number in SIGNALS)
        raise KeyError
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    with StopSignal() as stop:
        stop._previous[signal.SIGTERM] = None  # as it is for a handler of C
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, before[signal.SIGTERM])


@pytest.mark.parametrize("finished", [True, False])
def test_a_script_that_runs_several_programs_learns_that_one_was_asked_to_stop(
    tmp_path, monkeypatch, finished
):
    outcome = replace(tiny.trained().outcome, finished=finished, stopped_by="SIGTERM")
    monkeypatch.setattr(train, "run", lambda exp, workdir, init_from: outcome)
    with pytest.raises(Stopped, match="SIGTERM"):
        modes.run(tiny.settings(), workdir=str(tmp_path))
    assert issubclass(Stopped, KeyboardInterrupt)
    monkeypatch.setattr(train, "run", lambda exp, workdir, init_from: tiny.trained().outcome)
    assert modes.run(tiny.settings(), workdir=str(tmp_path)) is tiny.trained().outcome


def test_a_second_run_in_the_same_workdir_is_refused_and_disturbs_nothing(workdir):
    before = sorted(workdir.rglob("*"))
    with lock.held(workdir):
        for mode in ("train", "demo", "prepare", "reference"):
            with pytest.raises(UserError, match=f"{workdir} is in use by process {os.getpid()} "):
                modes.run(tiny.settings(), workdir=workdir, mode=mode)
    assert sorted(workdir.rglob("*")) == before


def test_a_stopped_run_saves_its_step_and_says_how_to_go_on(workdir, capsys, monkeypatch):
    make_dispatch = training_step.make_dispatch

    def interrupted(exp):
        dispatch = make_dispatch(exp)

        def run(state, batches, encoder):
            signal.raise_signal(signal.SIGTERM)
            return dispatch(state, batches, encoder)

        return run

    monkeypatch.setattr(train, "make_dispatch", interrupted)
    outcome = train.run(tiny.experiment(), workdir)
    assert not outcome.finished and (outcome.stopped_by, outcome.step) == ("SIGTERM", 19)
    assert (workdir / "checkpoints" / "19").is_dir()
    said = capsys.readouterr().out
    assert f"SIGTERM: saved step 19 of 24 in {workdir}; run the same command again" in said


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path):
    writer = metric_writer.MetricWriter(tmp_path, resumed_at=0)
    for step in (6, 12, 18):
        writer.scalars(step, {"loss": 1.0})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 24, "lo')  # a kill in the middle of a line
    metric_writer.MetricWriter(tmp_path, resumed_at=12).close()
    assert [m["step"] for m in metric_writer.read_metrics(tmp_path)] == [6, 12]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")


def test_the_held_out_loss_is_that_of_the_first_average_under_the_same_noise(tmp_path, capsys):
    changes = {"evaluate.while_training.loss_every_steps": 12}
    exp = tiny.experiment(changes)
    train.run(exp, tmp_path)
    lines = {m["step"]: m for m in metric_writer.read_metrics(tmp_path) if "eval/loss" in m}
    assert {step: m["images"] for step, m in lines.items()} == {12: 12 * 16, 24: 24 * 16}
    loss = HeldOutLoss(exp)
    expected = loss(tiny.trained().weights("0.9"), exp.config.seed)
    assert lines[24]["eval/loss"] == pytest.approx(expected, rel=1e-6)
    assert lines[24]["eval/loss"] < lines[12]["eval/loss"]
    assert loss(tiny.trained().weights("0.8"), exp.config.seed) != pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_without_held_out_examples_no_loss_of_them_is_logged(tmp_path, capsys):
    source = {"name": "synthetic", "side": 8, "channels": 1, "num_classes": 10, "size": 5}
    changes = {
        "data": {"source": source, "codec": {"name": "as_stored"}},
        "evaluate.while_training.loss_every_steps": 1,
        "train.steps": 1,
    }
    train.run(tiny.experiment(changes), tmp_path)
    assert not any("eval/loss" in m for m in metric_writer.read_metrics(tmp_path))
    said = capsys.readouterr().out
    assert "no eval/loss is logged: data.source holds out no examples" in said
    assert "train.batch_size = 16: a batch holds some of the 5 examples more than once" in said


@pytest.mark.slow
def test_samples_are_judged_while_training_as_evaluation_judges_them(tmp_path):
    changes = {"evaluate.while_training": {"every_steps": 12, "num": 20}, "evaluate.seeds": (0,)}
    train.run(tiny.experiment(changes), tmp_path)
    lines = {m["step"]: m for m in metric_writer.read_metrics(tmp_path) if "eval/fd" in m}
    assert list(lines) == [12, 24] and lines[12]["eval/fd"] != lines[24]["eval/fd"]
    [verdict] = evaluate.run(tiny.experiment(changes), tmp_path)["each"]
    assert {f"eval/{name}": pytest.approx(v, rel=1e-6) for name, v in verdict.items()} == {
        name: value for name, value in lines[24].items() if name.startswith("eval/")
    }
