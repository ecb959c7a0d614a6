"""Runs that went wrong: what is noted, what --mode=replay finds, which updates are skipped."""

import json
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from vectors import quick_jit

from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.data import loader
from ig_jax.errors import UserError
from ig_jax.monitoring import metric_writer
from ig_jax.monitoring.throughput import NonFiniteLoss
from ig_jax.optim.train_state import TrainState
from ig_jax.programs import replay
from ig_jax.training import trainer
from ig_jax.training.step import Noised, init_state, update_state

SHORT = {"train.steps": 8, "checkpoint.every_steps": 2, "log.every_steps": 2}


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A run whose second update is far too large, its experiment, and what was noted of it."""
    workdir = tmp_path_factory.mktemp("diverged")
    changes = {**SHORT, "optim.learning_rate": 1e30, "optim.warmup_steps": 0}
    exp = tiny.experiment(changes)
    with pytest.raises(NonFiniteLoss, match="--mode=replay computes this step again"):
        trainer.run(exp, workdir)
    return workdir, exp, json.loads((workdir / "not_finite.json").read_text())


def test_a_failure_is_noted_with_its_step_and_its_examples(diverged):
    _, exp, noted = diverged
    c = exp.config
    batch = next(loader.batches(c.data.source, 16, c.seed, start=16 * (noted["step"] - 1)))
    labels = c.data.source.batch(np.array(noted["examples"]))["label"]
    np.testing.assert_array_equal(labels, batch["label"])
    assert noted["loss"] in ("nan", "inf")


@pytest.mark.slow
def test_replay_goes_to_the_step_and_changes_nothing(diverged, capsys):
    workdir, exp, noted = diverged
    before = sorted(f.name for f in workdir.rglob("*"))
    found = replay.run(exp, workdir)
    assert found.startswith(("invalid value (nan)", "no operation gives nan, but the loss over"))
    assert found in capsys.readouterr().out
    assert sorted(f.name for f in workdir.rglob("*")) == before


@pytest.mark.slow
def test_replay_begins_with_the_weights_that_training_began_with(tmp_path):
    """Imported ones, which are a checkpoint of step 0."""
    exp = tiny.experiment(devices=jax.devices()[:1])
    weights = jax.tree.map(lambda x: x + 1, init_state(exp).params)
    checkpoints = Checkpoints(tmp_path)
    imported = TrainState(jax.numpy.int32(0), weights, opt_state=None, ema=None)
    checkpoints.save(imported, {"examples": 0}, exp.config.raw, "weights")
    checkpoints.wait()
    checkpoints.close()
    state, done, start = replay._state_before(exp, tmp_path, 5)
    assert (done, start) == (0, 0)
    jax.tree.map(np.testing.assert_array_equal, state.params, weights)


def test_replay_tells_that_an_earlier_update_was_too_large(diverged, tmp_path):
    """The step after: parameters are broken before it."""
    workdir, exp, noted = diverged
    (tmp_path / "not_finite.json").write_text(json.dumps({**noted, "step": noted["step"] + 1}))
    found = replay.run(exp, tmp_path)
    assert f"the update of step {noted['step']} was too large; lower optim.learning_rate" in found


@pytest.mark.slow
def test_replay_names_the_first_operation_that_gives_no_number():
    exp = tiny.experiment(devices=jax.devices()[:1])
    state = init_state(exp)
    # Finite weights, whose product with itself is not: inf - inf in the norm of the tokens.
    huge = jax.tree.map(lambda x: x * 1e38, state.params["x_embedder"])
    params = {**state.params, "x_embedder": huge}
    batch = next(loader.batches(exp.config.data.source, 16, 0))
    found = replay._look(exp, state.replace(params=params), batch)
    assert "invalid value (nan) encountered in" in found
    assert "called from ig_jax/models/" in found


@pytest.mark.slow
def test_replay_of_a_healthy_step_says_so_and_has_its_loss():
    exp = tiny.experiment(devices=jax.devices()[:1])
    batch = next(loader.batches(exp.config.data.source, 16, 0))
    found = replay._look(exp, init_state(exp), batch)
    assert found.startswith("every operation of it gives numbers here, and the loss is 2.")


def test_replay_without_a_failure_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no not_finite.json; nothing failed here"):
        replay.run(tiny.experiment(), tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"step": "3", "loss": "nan"}', '{"step": 0, "loss": "nan"}', "[" * 9999],
)
def test_a_damaged_note_of_a_failure_is_told(tmp_path, content):
    (tmp_path / "not_finite.json").write_text(content)
    with pytest.raises(
        UserError, match=f"{tmp_path}/not_finite.json: (does not say|is cut|is nested)"
    ):
        replay.run(tiny.experiment(), tmp_path)


@pytest.mark.slow
def test_updates_of_spikes_are_skipped_counted_and_told(tmp_path, capsys):
    """So low a factor that ordinary gradients are spikes."""
    exp = tiny.experiment({**SHORT, "train.steps": 40, "train.spike_factor": 1.01})
    outcome = trainer.run(exp, tmp_path)
    told = [m["skipped_updates"] for m in metric_writer.read_metrics(tmp_path)]
    assert sum(told) == int(outcome.state.opt_state.skipped) > 0
    assert told[:8] == [0] * 8  # the first 16 norms are for comparing with
    assert f"{max(told)} updates skipped, their gradients were spikes" in capsys.readouterr().out


@pytest.mark.slow
def test_parameters_and_averages_stand_still_where_an_update_is_skipped():
    exp = tiny.experiment({"train.spike_factor": 2.0})
    state = init_state(exp)
    guard = state.opt_state._replace(
        norms=0 * state.opt_state.norms + 1e-9, seen=jax.numpy.int32(128)
    )
    averages = jax.tree.map(lambda x: x + 1, state.ema)
    before = jax.device_get((state.params, averages))

    def gradients(params, batch, teacher, step, frozen):
        return jax.tree.map(jax.numpy.ones_like, params), {}

    state = state.replace(opt_state=guard, ema=averages)
    none = Noised(None, None, None)
    settings = {"optimizer": exp.optimizer, "teacher_decay": exp.teacher_decay}
    update = partial(update_state, gradients=gradients, **settings)
    after, metrics = quick_jit(update)(state, none)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.ema), before)
    assert int(metrics["skipped_updates"].value) == 1 and int(after.step) == 1


@pytest.mark.slow
def test_asked_for_a_profile_a_run_traces_some_steps(tmp_path):
    trainer.run(tiny.experiment({**SHORT, "profile.steps": 2, "profile.start": 3}), tmp_path)
    [made] = (tmp_path / "profile" / "plugins" / "profile").iterdir()
    names = {f.name for f in made.iterdir()}
    assert "perfetto_trace.json.gz" in names and any(n.endswith(".xplane.pb") for n in names)
