"""Going on with batches of another size and with other averages: nothing lost, all recorded."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.data import loader
from ig_jax.errors import UserError
from ig_jax.monitoring import metric_writer
from ig_jax.optim import ema
from ig_jax.training import trainer as train

OTHER = {"train.batch_size": 24, "train.ema_decays": (0.95, 0.8), "train.steps": 22}
SEEN = 18 * 16


def changes_of(workdir) -> list[tuple]:
    recorded = json.loads((workdir / "config.json").read_text())["changes"]
    return [(c["step"], c["field"], c["before"], c["now"]) for c in recorded]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The tiny run at step 18 of 24."""
    workdir = tiny.trained().copy(tmp_path_factory.mktemp("other") / "run")
    shutil.rmtree(workdir / "checkpoints" / "24")
    return workdir


@pytest.fixture(scope="module")
def gone_on(workdir):
    """The trainer that went on from there to step 22, its state before, and the batches it took."""
    trainer = train.Trainer(tiny.experiment(OTHER), workdir)
    before, dispatch, taken = jax.device_get(trainer.state), trainer.dispatch, []

    def noting(state, batches, encoder):
        taken.extend(jax.device_get(batches["label"]))
        return dispatch(state, batches, encoder)

    trainer.dispatch = noting
    trainer.run()
    trainer.close()
    return trainer, before, taken


def test_the_examples_go_on_without_loss_or_repetition(gone_on):
    trainer, _, taken = gone_on
    c = trainer.exp.config
    unbroken = loader.batches(c.data.source, 16, c.seed)
    labels = np.concatenate([next(unbroken)["label"] for _ in range(18 + 6)])
    np.testing.assert_array_equal(np.concatenate(taken), labels[SEEN : SEEN + 4 * 24])


@pytest.mark.slow
def test_averages_that_stay_go_on_and_a_new_one_starts_from_the_nearest(gone_on):
    _, before, _ = gone_on
    saved = Checkpoints(tiny.trained().workdir, reading=True)
    was = saved.restore(18, tiny.experiment().abstract_state).ema
    saved.close()
    assert set(before.ema) == {"0.95", "0.8"}
    jax.tree.map(np.testing.assert_array_equal, before.ema["0.8"], was["0.8"])
    jax.tree.map(np.testing.assert_array_equal, before.ema["0.95"], was["0.9"])
    leaves = zip(jax.tree.leaves(was["0.9"]), jax.tree.leaves(was["0.8"]), strict=True)
    assert any(np.any(a != b) for a, b in leaves)


@pytest.mark.parametrize(
    ("decay", "nearest"), [(0.99, "0.97"), (0.95, "0.97"), (0.94, "0.9"), (0.0, "0.6")]
)
def test_near_is_by_ratio_of_lengths(decay, nearest):
    averages = {name: {"w": np.float32(name)} for name in ("0.6", "0.9", "0.97")}
    found = ema.chosen(averages, (decay, 0.9))
    assert list(found) == [ema.name(decay), "0.9"]
    assert found[ema.name(decay)]["w"] == np.float32(nearest)


def test_what_was_seen_is_counted_in_checkpoints_and_metrics(workdir, gone_on):
    seen = SEEN + 4 * 24
    checkpoints = Checkpoints(workdir, reading=True)
    assert checkpoints.meta(22)["data"] == {"examples": seen}
    checkpoints.close()
    assert metric_writer.read_metrics(workdir)[-1]["images"] == seen


def test_changes_are_recorded_by_step_and_those_of_later_steps_are_undone(workdir, gone_on):
    made = [
        (18, "train.batch_size", 16, 24),
        (18, "train.ema_decays", [0.9, 0.8], [0.95, 0.8]),
        (18, "train.steps", 24, 22),
    ]
    assert sorted(changes_of(workdir)) == made
    more = {**OTHER, "optim.learning_rate": 1e-4, "log.every_steps": 2}
    train.Trainer(tiny.experiment(more), workdir).close()
    later = [(22, "log.every_steps", 6, 2), (22, "optim.learning_rate", 3e-3, 1e-4)]
    assert sorted(changes_of(workdir)) == made + later
    train.Trainer(tiny.experiment(OTHER), workdir).close()
    assert sorted(changes_of(workdir)) == made
    (workdir / "config.json").write_text("{")
    train.Trainer(tiny.experiment(OTHER), workdir).close()
    assert changes_of(workdir) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"train.batch_size": 24, "train.steps": 0, "train.images": 480},
            "--config.train.images=0 --config.train.steps=26 is as many images",
        ),
        (
            {"train.batch_size": 24, "train.steps": 0, "train.epochs": 2.0},
            "--config.train.epochs=0 --config.train.steps=127 is as many epochs",
        ),
        ({"model.depth": 3}, "train another run from its weights: --workdir=NEW --init_from="),
        ({"seed": 3}, "seed: 0 there, 3 here"),
    ],
)
def test_what_may_not_change_is_refused_with_the_way_out(tmp_path, changes, sentence):
    workdir = tiny.trained().copy(tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "24")
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError, match=sentence):
        train.Trainer(tiny.experiment(changes), workdir)
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.slow
def test_a_weight_that_changes_by_epochs_keeps_the_size_of_its_batches(tmp_path):
    falling = {"objective.terms.flow.weight_factor": 0.5, "train.steps": 1}
    train.run(tiny.experiment(falling), tmp_path)
    with pytest.raises(UserError, match="by which the weight of flow changes"):
        train.Trainer(tiny.experiment({**falling, "train.batch_size": 24}), tmp_path)
