"""The Python API: pipelines from runs and published files, and what they compute."""

import gc
import shutil
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
import tiny
from PIL import Image
from tiers import slow_but

import ig_jax
from ig_jax import api
from ig_jax.config.run_config import parse
from ig_jax.generation.batches import sample_batches
from ig_jax.models.sit import SiT
from ig_jax.objectives import TERMS
from ig_jax.objectives.flow import FlowMatching
from ig_jax.programs import export_checkpoint
from ig_jax.samplers import SAMPLERS
from ig_jax.samplers.euler import Euler
from ig_jax.training import trainer

LABELS = [3, 7, 0]


@pytest.fixture(scope="module")
def pipe():
    """The tiny run with lively weights: heads that predict zero would hide faults."""
    found = ig_jax.load(tiny.trained().workdir)
    return replace(found, params=lively.parameters(found.net))


@pytest.fixture(scope="module")
def noise(pipe):
    return np.random.default_rng(5).normal(size=(3, *pipe.latent_shape)).astype(np.float32)


def test_a_loaded_run_has_the_weights_that_are_asked_for():
    trained = tiny.trained()
    for weights, decay in (("ema", "0.9"), ("raw", None), ("0.8", "0.8")):
        found = ig_jax.load(str(trained.workdir), weights=weights)
        jax.tree.map(np.testing.assert_array_equal, found.params, trained.weights(decay))
    earlier = ig_jax.load(trained.workdir, step=18, weights="raw")
    assert not np.array_equal(
        earlier.params["final_layer"]["linear"]["kernel"],
        trained.weights()["final_layer"]["linear"]["kernel"],
    )


def test_samples_are_those_of_the_program(pipe):
    exp = tiny.experiment({"sample.labels": "3,7,0"})
    expected = list(sample_batches(exp.pipeline.generator(), pipe.params, 4, np.arange(3)))
    found = pipe.sample(labels=LABELS, seed=4)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected[0].images)
    np.testing.assert_array_equal(pipe.sample(num=4, seed=1).shape, (4, 8, 8, 1))


def test_one_step_is_internal_guidance_written_out(pipe, noise):
    """x - (v_readout + w (v - v_readout)) at t = 1, the whole way in one step of Euler."""
    v, readouts = pipe.velocity(noise, 1.0, LABELS)
    assert readouts.keys() == {1} and np.std(v) > 0.1
    for scale in (0.0, 0.7, 2.5):
        expected = noise - (readouts[1] + scale * (v - readouts[1]))
        settings = {"sampler": "euler", "steps": 1, "cfg": 1.0, "noise": noise}
        found = pipe.sample_latents(labels=LABELS, ig=scale, **settings)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_cfg_starts_from_the_null_class_and_holds_on_its_interval(pipe, noise):
    v, _ = pipe.velocity(noise, 1.0, LABELS)
    null, _ = pipe.velocity(noise, 1.0, [pipe.num_classes] * 3)
    settings = {"sampler": "euler", "steps": 1, "ig": 1.0, "noise": noise}
    found = pipe.sample_latents(labels=LABELS, cfg=3.0, **settings)
    np.testing.assert_allclose(found, noise - (null + 3 * (v - null)), rtol=0, atol=2e-5)
    outside = pipe.sample_latents(labels=LABELS, cfg=(3.0, 0.0, 0.9), **settings)
    np.testing.assert_allclose(outside, noise - v, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_autoguidance_extrapolates_from_another_pipeline(pipe, noise):
    smaller = jax.tree.map(lambda p: 0.7 * p, pipe.params)
    other = replace(pipe, params=smaller)
    v, _ = pipe.velocity(noise, 1.0, LABELS)
    worse, _ = other.velocity(noise, 1.0, LABELS)
    settings = {"sampler": "euler", "steps": 1, "ig": 1.0, "cfg": 1.0, "noise": noise}
    found = pipe.sample_latents(labels=LABELS, autoguidance=1.5, guide=other, **settings)
    np.testing.assert_allclose(found, noise - (worse + 1.5 * (v - worse)), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_guide_lives_as_long_as_the_programs_that_hold_it(pipe, noise):
    """Otherwise another could take its address, and be taken for it."""
    other = replace(pipe)
    settings = {"sampler": "euler", "steps": 1, "noise": noise}
    pipe.sample_latents(labels=LABELS, autoguidance=1.5, guide=other, **settings)
    kept = weakref.ref(other)
    del other
    gc.collect()
    assert kept() is not None


SOLVERS = [
    "euler",
    "heun",
    "euler_maruyama",
    "edm_stochastic",
    "dopri5",
    "dpmpp_2m",
    "adams_bashforth",
]


@pytest.mark.parametrize("sampler", slow_but(["euler"], SOLVERS))
def test_the_trajectory_ends_in_the_samples_and_follows_the_steps(pipe, noise, sampler):
    given = {"labels": LABELS, "noise": noise, "sampler": sampler, "steps": 5, "seed": 2}
    if sampler == "dopri5":
        given |= {"steps": 200, "ig": (2.0, 0.3, 1.0)}
    latents, states = pipe.sample_latents(**given, trajectory=True)
    steps = 2 if sampler == "dopri5" else 5  # for dopri5 the pieces between the intervals' ends
    assert states.shape == (3, steps, *pipe.latent_shape)
    np.testing.assert_array_equal(states[:, -1], latents)
    np.testing.assert_array_equal(pipe.sample_latents(**given), latents)
    if sampler == "euler":
        first = pipe.sample_latents(**{**given, "steps": 5}, trajectory=True)[1][:, 0]
        v, early = pipe.velocity(noise, 1.0, LABELS)
        null, null_early = pipe.velocity(noise, 1.0, [10] * 3)
        s = pipe.sampling
        v, null = (e + s.ig.scale * (f - e) for f, e in ((v, early[1]), (null, null_early[1])))
        expected = noise - 0.2 * (null + s.cfg.scale * (v - null))
        np.testing.assert_allclose(first, expected, rtol=0, atol=2e-5)


def test_features_are_the_tokens_of_noisy_latents(pipe):
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    clean = pipe.features(images, 0.0, (2, 1), labels=LABELS)
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    np.testing.assert_array_equal(pipe.encode(images), x)
    times = pipe.process.condition_time(jnp.zeros(3))
    expected = pipe.net(pipe.params, x, times, jnp.array(LABELS), taps=(1, 2)).features
    assert clean.keys() == {1, 2} and clean[1].shape == (3, 16, 16)
    for depth in (1, 2):
        np.testing.assert_allclose(clean[depth], expected[depth], rtol=0, atol=1e-4)
    noisy = [pipe.features(images, [0.1, 0.5, 0.9], (1,), seed=s)[1] for s in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])
    np.testing.assert_array_equal(pipe.decode(pipe.encode(images)), images)
    noise = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    given = pipe.features(images, 1.0, (1,), noise=noise)[1]
    np.testing.assert_array_equal(given, pipe.features(~images, 1.0, (1,), noise=noise)[1])
    assert not np.allclose(given, pipe.features(images, 1.0, (1,))[1])
    with pytest.raises(ig_jax.UserError, match=r"noise: has shape \(1, 8, 8, 1\), must be \(3, 8"):
        pipe.features(images, 1.0, (1,), noise=noise[:1])


@pytest.mark.slow
def test_calls_compile_once_for_each_shape_and_setting(pipe, noise):
    fresh = replace(pipe)
    for scale in (0.5, 2.0, 3.0):
        fresh.sample_latents(labels=LABELS, ig=scale, noise=noise)
        fresh.sample_latents(labels=[1, 2, 3], ig=scale, seed=7, noise=noise)
    (generator,) = fresh._generators.values()
    assert generator._program._cache_size() == 1
    fresh.sample_latents(labels=LABELS, ig=1.0, noise=noise)
    assert generator._program._cache_size() == 2


@pytest.mark.slow
def test_more_labels_than_a_batch_give_the_same_samples(pipe):
    labels = np.arange(23) % 10
    whole = pipe.sample_latents(labels=labels, seed=3)
    few = replace(pipe, sampling=replace(pipe.sampling, batch_size=6))
    np.testing.assert_allclose(few.sample_latents(labels=labels, seed=3), whole, atol=1e-4)


@pytest.mark.slow
def test_a_run_opens_without_its_data_set(tmp_path):
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    for label in "ab":
        (data / label).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / label / f"{i}.png")
    source = {"name": "image_folder", "path": str(data), "size": 8, "num_classes": 2}
    changes = {"data.source": source, "train.steps": 2, "checkpoint.every_steps": 2}
    trainer.run(tiny.experiment({**changes, "train.steps_per_dispatch": 1}), tmp_path / "run")
    shutil.rmtree(data)
    found = ig_jax.load(tmp_path / "run")
    assert found.num_classes == 2 and found.latent_shape == (8, 8, 3)
    assert found.sample(labels=[0, 1, 2]).shape == (3, 8, 8, 3)


@pytest.mark.slow
def test_a_published_file_samples_as_the_run_that_wrote_it(tmp_path):
    file = tmp_path / "published.safetensors"
    export_checkpoint.export_checkpoint(tiny.trained().workdir, file, "ema")
    found = ig_jax.load(file)
    ours = ig_jax.load(tiny.trained().workdir)
    jax.tree.map(np.testing.assert_array_equal, found.params, ours.params)
    assert found.net.family is SiT and found.net.settings.readouts == (1,)
    settings = {"labels": LABELS, "ig": 2.0, "cfg": (1.5, 0.0, 1.0)}
    settings |= {"sampler": "euler", "steps": 2}
    x = found.sample_latents(**settings)
    np.testing.assert_allclose(x, ours.sample_latents(**settings), rtol=0, atol=1e-4)


BAD_CALLS = [
    ({"labels": [3, 11]}, r"labels = \[3, 11\]: must lie in 0..9, or be 10 for the null class"),
    ({"labels": np.array([0.5])}, "must be a list of class numbers"),
    ({"labels": []}, "must be a list of class numbers"),
    ({"labels": [1], "num": 3}, "num = 3: leave it out, 1 labels are given"),
    ({"labels": [1], "ig": (2.0, 0.9, 0.1)}, "ig: low = 0.9, high = 0.1: must satisfy"),
    ({"labels": [1], "autoguidance": 2.0}, "autoguidance = 2: name the network to extrapolate"),
    ({"labels": [1], "sampler": "plms"}, "sampler = 'plms': is unknown; known: euler"),
    ({"labels": [1], "steps": 0}, "steps: num_steps = 0: must be at least 1"),
    ({"labels": [1], "dtype": "float16"}, "dtype = 'float16': must be one of float32, bfloat16"),
    (
        {"labels": [1], "noise": np.zeros((1, 8, 8, 3))},
        r"noise: has shape .*must be \(1, 8, 8, 1\)",
    ),
]


@pytest.mark.parametrize("call, sentence", BAD_CALLS, ids=[c[1][:20] for c in BAD_CALLS])
def test_a_bad_call_is_refused_in_a_sentence(pipe, call, sentence):
    with pytest.raises(ig_jax.UserError, match=sentence):
        pipe.sample(**call)


def test_what_does_not_fit_the_network_is_refused(pipe):
    plain = replace(pipe, has_null_class=False)
    with pytest.raises(
        ig_jax.UserError, match="cfg = 1.5: this network was trained without a null"
    ):
        plain.sample(labels=[1], cfg=1.5)
    with pytest.raises(ig_jax.UserError, match=r"depths = \(1, 3\): must lie in 1..2"):
        pipe.features(np.zeros((1, 8, 8, 1), np.uint8), 0.1, (1, 3))
    with pytest.raises(ig_jax.UserError, match=r"t = 1.5: must lie in \[0, 1\]"):
        pipe.velocity(np.zeros((1, 8, 8, 1)), 1.5, [1])
    for images in (np.zeros((1, 9, 9, 1), np.uint8), np.zeros((8, 8, 1), np.uint8)):
        with pytest.raises(ig_jax.UserError, match="images: uint8 of shape .* become no latents"):
            pipe.encode(images)


def test_what_cannot_be_loaded_is_refused(tmp_path):
    workdir = tiny.trained().workdir
    for arguments, sentence in [
        ((tmp_path,), "holds no checkpoint"),
        ((tmp_path / "absent.pt",), "absent.pt"),
        ((" ",), "path = ' ': is empty"),
        (("gs://bucket/run",), "is a URL"),
    ]:
        with pytest.raises(ig_jax.UserError, match=sentence):
            ig_jax.load(*arguments)
    for settings, sentence in [
        ({"weights": "0.7"}, "weights = '0.7': must be one of ema, raw, 0.9, 0.8"),
        ({"step": 5}, "step = 5: .* holds no such checkpoint"),
        ({"readout_depth": 8}, "readout_depth: is for published files"),
        ({"codec_weights": "vae.safetensors"}, "codec_weights: the codec of .* has no weights"),
    ]:
        with pytest.raises(ig_jax.UserError, match=sentence):
            ig_jax.load(workdir, **settings)


def test_registered_classes_are_known_to_configs_and_calls(pipe, noise, monkeypatch):
    monkeypatch.setitem(TERMS, "twice", None)
    monkeypatch.setitem(SAMPLERS, "backwards", None)
    del TERMS["twice"], SAMPLERS["backwards"]

    class Twice(FlowMatching):
        pass

    class Other(Euler):
        pass

    ig_jax.register_term("twice", Twice)
    ig_jax.register_term("twice", Twice)  # a notebook's cell, run again
    config = parse(tiny.settings({"objective.terms.twice": {"weight": 1.0}}))
    assert isinstance(config.objective.terms["twice"], Twice)
    ig_jax.register_sampler("backwards", Other)
    pipe.sample_latents(labels=LABELS, noise=noise, sampler="backwards", steps=2)
    with pytest.raises(ig_jax.UserError, match="sampler 'euler': is one of this package's own"):
        ig_jax.register_sampler("euler", Other)
    with pytest.raises(ig_jax.UserError, match="term 'My term': must be a name"):
        ig_jax.register_term("My term", Twice)
    del TERMS["twice"], SAMPLERS["backwards"]


def test_names_are_imported_at_their_first_use():
    assert set(ig_jax.__all__) <= set(dir(ig_jax))
    assert all(getattr(ig_jax, name) is getattr(api, name) for name in ig_jax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = ig_jax.absent


def test_loading_a_run_logs_no_warnings(caplog):
    ig_jax.load(tiny.trained().workdir)
    assert [record for record in caplog.records if "read" in record.message] == []
