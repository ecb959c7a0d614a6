"""Training: what a step computes in any arrangement, what a run leaves behind, and resuming."""

import struct
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from runs import assert_same_bits, metrics
from tensorboardX.proto import event_pb2, plugin_hparams_pb2
from vectors import quick_jit

from ig_jax import optim
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.config.parser import ConfigError
from ig_jax.data import loader
from ig_jax.parallel.mesh import replicate_locally, to_global
from ig_jax.training import preview, step
from ig_jax.training import trainer as train

RATES = {
    *("steps_per_second", "images_per_second", "model_tflops_per_device", "memory_gib"),
    *("seconds/step", "seconds/data", "seconds/checkpoint"),
}
TERMS = ("flow", "internal_guidance")


def saved_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def unbroken():
    """The tiny run: 24 steps, logs and checkpoints every 6, programs of 4 steps."""
    return tiny.trained()


def four_steps(changes=None, devices=None, done=0):
    """State and metrics after one program of four steps on the first four batches.

    A state of which `done` steps are said to be done differs from a fresh one in that alone.
    """
    exp = tiny.experiment(changes or {}, devices)
    c = exp.config
    data = loader.batches(c.data.source, c.train.batch_size, c.seed)
    rows = [next(data) for _ in range(4)]
    stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
    batches = to_global(stacked, exp.mesh, c.train.batch_size, axis=1)
    state = step.init_state(exp)
    state = state.replace(step=state.step + done)
    state, found = step.make_dispatch(exp)(state, batches, {})
    return state, jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def reference():
    return four_steps()


# One device sums a batch in another order; a wrong mean or a repeated draw moves it by percents.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["one device", "two parts"])
def test_a_step_is_the_same_however_its_batch_is_cut(reference, name):
    parts = {"train.accumulation": 2} if "parts" in name else {}
    devices = jax.devices()[:1] if "device" in name else None
    (state, found), (state_2, found_2) = reference, four_steps(parts, devices)
    assert set(found) == set(found_2)
    for key in found:
        with np.errstate(invalid="ignore"):  # no example in some tenths of time
            np.testing.assert_allclose(found[key].value, found_2[key].value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state_2.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert int(state_2.step) == 4


@pytest.mark.slow
def test_every_step_draws_times_noise_and_labels_of_its_own(reference):
    again, later = four_steps()[1], four_steps(done=100)[1]
    np.testing.assert_array_equal(again["loss"].value, reference[1]["loss"].value)
    # The first loss of a fresh network is that of predicting 0: it depends on the draws alone.
    assert abs(later["loss"].value[0] / reference[1]["loss"].value[0] - 1) > 1e-3


@pytest.mark.slow
def test_bfloat16_trains_near_float32_and_keeps_float32_parameters(reference):
    state, found = four_steps({"model.dtype": "bfloat16"})
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    np.testing.assert_allclose(found["loss"].value, reference[1]["loss"].value, rtol=5e-3)
    assert not np.array_equal(found["loss"].value, reference[1]["loss"].value)


def test_the_loss_falls_on_the_digits(unbroken):
    losses = [m["loss"] for m in metrics(unbroken.workdir)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_takes_exactly_the_steps_asked(unbroken):
    assert unbroken.outcome.finished and unbroken.outcome.stopped_by is None
    assert unbroken.outcome.step == int(unbroken.outcome.state.step) == 24


def test_the_newest_checkpoints_are_kept(unbroken):
    assert saved_steps(unbroken.workdir) == [18, 24]


def test_metrics_have_one_object_a_line_with_step_images_losses_and_rates(unbroken):
    found = metrics(unbroken.workdir)
    assert [m["step"] for m in found] == [6, 12, 18, 24]
    assert [m["images"] for m in found] == [96, 192, 288, 384]
    for m in found:
        scalars = {name for name in m if not name.startswith("loss_by_time/")}
        assert scalars == {"step", "images", "loss", "grad_norm", "learning_rate", *RATES} | {
            f"loss/{term}" for term in TERMS
        }
        assert m["loss"] == pytest.approx(m["loss/flow"] + 0.5 * m["loss/internal_guidance"])
        schedule = optim.learning_rate(unbroken.exp.config.optim, 24)
        assert m["learning_rate"] == pytest.approx(float(schedule(m["step"] - 1)))
        assert m["images_per_second"] == pytest.approx(16 * m["steps_per_second"])


def test_metrics_have_the_loss_of_every_term_by_tenths_of_time(unbroken):
    """96 examples a line: a tenth without any has no entry, all of the 384 fill every tenth."""
    buckets = set()
    for m in metrics(unbroken.workdir):
        found = {name: {} for name in TERMS}
        for key, value in m.items():
            if key.startswith("loss_by_time/"):
                _, term, bucket = key.split("/")
                found[term][bucket] = value
        assert set(found["flow"]) == set(found["internal_guidance"])
        for term, by_time in found.items():
            values = list(by_time.values())
            assert min(values) < m[f"loss/{term}"] < max(values)
        buckets |= set(found["flow"])
    assert buckets == {f"{i / 10:.1f}" for i in range(10)}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """The only line of metrics of a run of four steps."""
    workdir = tmp_path_factory.mktemp("short")
    train.run(tiny.experiment({"train.steps": 4, "log.every_steps": 100}), workdir)
    [line] = metrics(workdir)  # of the last step, in any case
    assert line["step"] == 4
    return line


@pytest.mark.slow
def test_a_line_of_metrics_is_the_mean_over_its_steps(line, reference):
    assert line["loss"] == pytest.approx(reference[1]["loss"].value.mean(), rel=1e-6)


@pytest.mark.slow
def test_losses_by_time_are_the_means_over_all_examples_of_the_steps_of_a_line(line, reference):
    _, found = reference
    for term in TERMS:
        by_time = found[f"loss_by_time/{term}"]
        examples, sums = by_time.count.sum(axis=0), by_time.total.sum(axis=0)
        assert examples.sum() == 4 * 16
        assert sums.sum() / 64 == pytest.approx(line[f"loss/{term}"], rel=1e-6)
        for i in np.flatnonzero(examples):
            mean = line[f"loss_by_time/{term}/{i / 10:.1f}"]
            assert mean == pytest.approx(sums[i] / examples[i], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, 0.8])
def test_the_first_average_or_the_one_that_is_named_is_the_teacher(unbroken, decay):
    """One step from a state whose averages differ from its weights and from each other."""
    term = {"weight": 1.0, "omega": 0.5, "bias": "ema"}
    exp = tiny.experiment(
        {
            "objective.terms": {"accelerated_flow": term},
            "objective.label_drop": 0.1,
            "objective.teacher_decay": decay,
        }
    )
    state, objective = unbroken.outcome.state, exp.objective
    data = next(loader.batches(exp.config.data.source, 16, 0))
    x0 = exp.config.data.codec.latent(jnp.asarray(data["stored"]), jax.random.key(0))
    labels = jnp.asarray(data["label"])
    draws = objective.draw(jax.random.key(0), x0)
    gradients = partial(step.gradients, objective=objective, parts=2)
    settings = {"optimizer": exp.optimizer, "teacher_decay": exp.teacher_decay}
    update = quick_jit(partial(step.update_state, gradients=gradients, **settings))
    _, found = update(state, step.Noised(x0, labels, draws))
    loss = quick_jit(lambda teacher: objective(state.params, x0, labels, draws, teacher)[0])
    losses = {n: float(loss(w)) for n, w in {**state.ema, "raw": state.params}.items()}
    assert exp.config.train.ema_decays == (0.9, 0.8) and len({*losses.values()}) == 3
    assert list(state.ema) == ["0.8", "0.9"]  # as a compiled program hands a dict back
    assert float(found["loss"].value) == pytest.approx(losses[str(decay or 0.9)], rel=1e-6)


def test_a_teacher_that_is_no_average_of_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"teacher_decay = 0.7: must be one of train.ema_decays"):
        tiny.experiment({"objective.teacher_decay": 0.7})


def test_tensorboard_gets_every_scalar(unbroken):
    [file] = (unbroken.workdir / "tensorboard").iterdir()
    for name in metrics(unbroken.workdir)[0].keys() - {"step"}:
        assert name.encode() in file.read_bytes()


def test_tensorboard_gets_the_settings_as_hyper_parameters(unbroken):
    [file] = (unbroken.workdir / "tensorboard").iterdir()
    found, content = {}, file.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        for value in event_pb2.Event.FromString(content[12 : 12 + size]).summary.value:
            if value.metadata.plugin_data.plugin_name == "hparams":
                plugin = plugin_hparams_pb2.HParamsPluginData
                found[value.tag] = plugin.FromString(value.metadata.plugin_data.content)
        content = content[12 + size + 4 :]
    start = found["_hparams_/session_start_info"].session_start_info.hparams
    assert start["optim.learning_rate"].number_value == 3e-3
    assert start["model.name"].string_value == "sit" and start["model.qk_norm"].bool_value is False
    assert start["train.ema_decays"].string_value == "(0.9, 0.8)"
    [metric] = found["_hparams_/experiment"].experiment.metric_infos
    assert metric.name.tag == "loss"


@pytest.fixture(scope="module", params=[6, pytest.param(18, marks=pytest.mark.slow)])
def resumed(request, tmp_path_factory):
    """The tiny run in two halves; it stops off the grid of its programs. Draws previews."""
    workdir = tmp_path_factory.mktemp("resumed")
    first = {"train.steps": request.param, "log.samples_every_steps": 6}
    train.run(tiny.experiment(first), workdir)
    trainer = train.Trainer(tiny.experiment({"log.samples_every_steps": 6}), workdir)
    assert trainer.step == request.param
    outcome = trainer.run()
    trainer.close()
    return workdir, outcome, trainer


def test_stopping_and_going_on_gives_the_bits_of_an_unbroken_run(unbroken, resumed):
    _, outcome, _ = resumed
    assert_same_bits(outcome.state, unbroken.outcome.state)


def test_what_is_on_disk_after_going_on_has_the_bits_of_an_unbroken_run(unbroken, resumed):
    workdir, _, _ = resumed
    checkpoints = checkpoint_manager.Checkpoints(workdir)
    restored = checkpoints.restore(24, unbroken.exp.abstract_state)
    assert checkpoints.meta(24)["data"] == {"examples": 24 * 16}
    checkpoints.close()
    assert_same_bits(restored, unbroken.outcome.state)


def test_metrics_after_going_on_are_those_of_an_unbroken_run(unbroken, resumed):
    assert metrics(resumed[0], without=RATES) == metrics(unbroken.workdir, without=RATES)


def test_no_program_is_compiled_twice(resumed):
    """Two programs, of one and of four steps, however often they run and wherever from."""
    assert resumed[2].dispatch._cache_size() == 2


def test_previews_show_both_ways_of_sampling_and_change_from_step_to_step(resumed):
    files = sorted((resumed[0] / "previews").iterdir())
    assert [f.name for f in files] == [f"step_{s:08d}.png" for s in (6, 12, 18, 24)]
    first, last = (np.asarray(Image.open(f)) for f in (files[0], files[-1]))
    assert first.shape == last.shape and (first != last).mean() > 0.1
    width = (last.shape[1] - 3 * 16) // 2  # two panels, with gaps of 16 pixels around them
    unguided, guided = last[30:, 16 : 16 + width], last[30:, 32 + width : 32 + 2 * width]
    assert (unguided != guided).mean() > 0.1
    events = b"".join(f.read_bytes() for f in (resumed[0] / "tensorboard").iterdir())
    assert b"samples" in events and b"PNG" in events


def test_previews_are_drawn_with_the_first_average(resumed, tmp_path):
    workdir, outcome, trainer = resumed
    weights = replicate_locally(trainer.exp.mesh, outcome.state.ema["0.9"])
    drawn = preview.Preview(trainer.exp.pipeline, tmp_path).draw(weights, 24)
    written = Image.open(workdir / "previews" / "step_00000024.png")
    np.testing.assert_array_equal(drawn, np.asarray(written))


def test_running_a_finished_run_again_changes_nothing(unbroken, tmp_path, monkeypatch):
    workdir = unbroken.copy(tmp_path)
    monkeypatch.setattr(train, "make_dispatch", lambda exp: None)  # calling it would raise
    outcome = train.run(unbroken.exp, workdir)
    assert outcome.finished and outcome.step == 24
    assert_same_bits(outcome.state, unbroken.outcome.state)
    assert metrics(workdir) == metrics(unbroken.workdir) != []
    assert saved_steps(workdir) == [18, 24]
