"""Autoguidance from end to end: the worse network is a checkpoint of this or of a smaller run."""

import jax
import numpy as np
import pytest
import tiny

from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.data import SOURCES
from ig_jax.data.sources.digits import Digits
from ig_jax.errors import UserError
from ig_jax.generation import batches, variants
from ig_jax.programs import dry_run, guide_model, run_record, sample

NUM = 20
UNGUIDED = {"sample.ig.scale": 1.0, "sample.cfg.scale": 1.0}
SMALLER = {"model.hidden_size": 8, "model.depth": 3, "model.readouts": (2,)}


def save(changes, workdir, *steps: int) -> None:
    """Checkpoints of a run that was never trained: drawn weights, of which each step has others."""
    exp = tiny.experiment(changes)
    state = exp.abstract_state
    checkpoints = checkpoint_manager.Checkpoints(workdir, keep_last=len(steps))
    for step in steps:
        rng = np.random.default_rng(step)

        def drawn(leaf, rng=rng):
            values = (0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
            return jax.device_put(values, leaf.sharding)

        params, averages = jax.tree.map(drawn, (state.params, state.ema))
        count = jax.device_put(np.int32(step), state.step.sharding)
        now = state.replace(step=count, params=params, ema=averages, opt_state=None)
        checkpoints.save(now, {"examples": step}, exp.config.raw)
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """The workdir of a narrower and deeper run with two checkpoints."""
    workdir = tmp_path_factory.mktemp("smaller")
    save(SMALLER, workdir, 6, 12)
    return workdir


def guided_by(workdir, scale: float = 2.0, **guide) -> dict:
    return {
        "sample.autoguidance.scale": scale,
        "sample.guide": {"workdir": str(workdir), "step": 0, "weights": "ema"} | guide,
    }


def latents(changes, **chosen) -> np.ndarray:
    """Latents of the tiny run's newest averages under a config, as `sample.run` would draw them."""
    exp = tiny.experiment(changes)
    _, params = run_record.load_weights(exp, tiny.trained().workdir)
    generator = exp.pipeline.generator(guide=guide_model.load(exp.pipeline), decode=lambda x: x)
    [(_, found, _)] = batches.sample_batches(generator, params, 0, np.arange(NUM), **chosen)
    return found


@pytest.fixture(scope="module")
def plain():
    return latents(UNGUIDED)


def test_a_worse_network_changes_the_samples_and_scale_1_does_not(plain, smaller):
    guided = latents({**UNGUIDED, **guided_by(smaller)})
    assert (np.abs(guided - plain).max(axis=(1, 2, 3)) > 0.1).all()
    np.testing.assert_array_equal(latents({**UNGUIDED, **guided_by(smaller, scale=1.0)}), plain)


@pytest.mark.slow
def test_a_network_is_not_guided_by_itself(plain):
    """Away from its own weights there is no way to go, at any scale."""
    alike = latents({**UNGUIDED, **guided_by(tiny.trained().workdir, scale=5.0)})
    np.testing.assert_allclose(alike, plain, atol=1e-5)


@pytest.mark.slow
def test_one_step_of_euler_goes_from_the_worse_velocity_through_the_better(smaller):
    """Scale 0 is the worse network alone: 3 at scale 3 is three times as far from it as 1."""
    one = {**UNGUIDED, "sample.sampler.num_steps": 1}
    ends = {w: latents({**one, **guided_by(smaller, scale=w)}) for w in (0.0, 1.0, 3.0)}
    expected = ends[0.0] + 3 * (ends[1.0] - ends[0.0])
    np.testing.assert_allclose(ends[3.0], expected, atol=1e-4)
    exp = tiny.experiment({**SMALLER, **one, "sample.weights": "ema"})
    _, params = run_record.load_weights(exp, smaller)
    generator = exp.pipeline.generator(decode=lambda x: x)
    [(_, alone, _)] = batches.sample_batches(generator, params, 0, np.arange(NUM))
    np.testing.assert_allclose(ends[0.0], alone, atol=1e-5)


@pytest.mark.slow
def test_step_and_weights_choose_the_checkpoint_and_0_is_the_newest(smaller):
    def drawn(**guide):
        return latents({**UNGUIDED, **guided_by(smaller, **guide)})

    newest, early = drawn(), drawn(step=6)
    np.testing.assert_array_equal(drawn(step=12), newest)
    others = [early, drawn(weights="raw"), drawn(weights="0.8")]
    for i, one in enumerate(others):
        for other in (newest, *others[:i]):
            assert np.abs(one - other).max() > 1e-2
    np.testing.assert_array_equal(drawn(weights="0.9"), newest)  # the first average


def test_an_earlier_checkpoint_of_the_same_run_guides():
    run = tiny.trained().workdir
    worse = guide_model.load(tiny.experiment(guided_by(run, step=18)).pipeline)
    checkpoints = checkpoint_manager.Checkpoints(run)
    exp = tiny.trained().exp
    expected = checkpoints.weights(18, "ema", exp.replicated_params)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, worse.params, expected)
    assert worse.net == exp.net and worse.process == exp.config.process


def test_a_guide_of_another_prediction_is_read_by_its_own_process(tmp_path):
    save({**SMALLER, "process.prediction": "noise"}, tmp_path, 6)
    worse = guide_model.load(tiny.experiment(guided_by(tmp_path)).pipeline)
    assert worse.process.prediction == "noise" and worse.net.settings.hidden_size == 8


def test_without_autoguidance_no_other_run_is_looked_for(tmp_path):
    nowhere = {"workdir": str(tmp_path / "nowhere"), "step": 3, "weights": "ema"}
    assert guide_model.load(tiny.experiment({"sample.guide": nowhere}).pipeline) is None


def refusal(changes) -> str:
    with pytest.raises(UserError) as caught:
        guide_model.load(tiny.experiment(changes).pipeline)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_guide_without_checkpoints_is_refused_by_its_workdir(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(guided_by(tmp_path / "nowhere"))
    (tmp_path / "checkpoints").mkdir()
    assert str(tmp_path) in refusal(guided_by(tmp_path))


def test_a_step_that_the_guide_lacks_is_refused_with_those_it_has(smaller):
    message = refusal(guided_by(smaller, step=7))
    assert message.startswith("sample.guide.step = 7: ") and message.endswith("only 6, 12")


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"process.path": "cosine"}, "its process.path are cosine, this run's linear"),
        ({"data.source": {"name": "five", "split": "train"}}, "its classes are 5, this run's 10"),
        ({"data.source": {"name": "small", "split": "train"}}, r"its latents are \(4, 4, 1\)"),
    ],
)
def test_a_guide_of_other_data_or_another_path_is_refused(tmp_path, monkeypatch, there, message):
    class Five(Digits):
        num_classes = 5

    class Small(Digits):
        stored_shape = (4, 4, 1)

        def __len__(self) -> int:
            return 100

    monkeypatch.setitem(SOURCES, "five", Five)
    monkeypatch.setitem(SOURCES, "small", Small)
    save({**SMALLER, **there}, tmp_path, 6)
    with pytest.raises(UserError, match=f"sample.guide.workdir = {tmp_path}: {message}"):
        guide_model.load(tiny.experiment(guided_by(tmp_path)).pipeline)


@pytest.mark.slow
def test_the_programs_draw_with_the_guide(tmp_path, smaller):
    """Files, evaluation and dry run; the settings beside the files name the guide."""
    workdir = tiny.trained().copy(tmp_path)
    exp = tiny.experiment({**UNGUIDED, **guided_by(smaller), "sample.sampler.num_steps": 2})
    guided, plain = (
        np.load(sample.run(e, workdir) / "samples.npz")["arr_0"]
        for e in (exp, tiny.experiment({**UNGUIDED, "sample.sampler.num_steps": 2}))
    )
    assert (guided != plain).reshape(len(plain), -1).any(axis=1).all()
    assert list(variants.variants(exp.config.sample.guidances)) == ["plain", "autoguidance"]
    text = dry_run.describe(exp)
    assert "2 network evaluations a sample and 2 of the guiding network" in text
    assert "autoguidance 2" in text


def test_a_search_over_autoguidance_needs_the_name_of_a_run():
    with pytest.raises(UserError, match="^sample.guide.workdir = None: .* name its run$"):
        guide_model.load(tiny.experiment().pipeline, wanted=True)
