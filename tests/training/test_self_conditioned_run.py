"""Runs with self-conditioning: on two devices, gone on with, sampled, exported and imported."""

from dataclasses import replace

import jax
import lively
import meshes
import numpy as np
import pytest
import tiny

import ig_jax
from configs import published
from ig_jax import modes, pytree
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.errors import UserError
from ig_jax.interop import declared
from ig_jax.interop.detect import detect
from ig_jax.io import state_dict
from ig_jax.programs.export_checkpoint import export_checkpoint
from ig_jax.programs.import_checkpoint import import_checkpoint

ON = {"tap": None, "normalise": True, "scaling": "channels", "stop_gradient": False}
# A readout behind the tap, and a teacher whose pass ends behind it, too.
RUN = {
    "model.hidden_size": 16,
    "model.self_conditioning": {**ON, "tap": 1},
    "model.readouts": (2,),
    "objective.terms": {
        "flow": {"weight": 1.0},
        "internal_guidance": {"weight": 0.5},
        "self_alignment": {"weight": 0.5, "depth": 1, "teacher_depth": 2},
    },
}


@pytest.fixture(scope="module")
def single():
    """Programs on one device, and what they do in their first steps."""
    programs = meshes.Programs(meshes.experiment((1, 1, 1), RUN))
    state = programs.begin()
    initial = meshes.arrays(initial=state.params)
    return programs, initial, programs.train(state)


@pytest.mark.slow
def test_two_devices_that_share_every_weight_train_as_one_does(single):
    _, initial, (state, metrics) = single
    programs = meshes.Programs(meshes.experiment((1, 2, 1), RUN))
    split = programs.begin()
    found = meshes.arrays(initial=split.params)
    assert all(np.array_equal(found[name], initial[name]) for name in initial)
    kernel = split.params["self_conditioning"]["project"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 16)
    split, theirs = programs.train(split)
    np.testing.assert_allclose(theirs["loss"], metrics["loss"], rtol=2e-6)
    for path, leaf in pytree.flatten(jax.device_get(state.params)).items():
        other = pytree.flatten(jax.device_get(split.params))[path]
        np.testing.assert_allclose(other, leaf, rtol=0, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_all_of_it_learns(single):
    programs, _, (state, _) = single
    fresh = pytree.flatten(programs.begin().params["self_conditioning"])
    trained = pytree.flatten(state.params["self_conditioning"])
    assert {path for path in fresh if np.any(fresh[path] != trained[path])} == {
        "project.kernel", "project.bias", "scale.kernel", "scale.bias",
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_has_the_bits_of_one_that_never_stopped(
    single, tmp_path
):
    programs, _, (state, _) = single
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, programs.batches(0)[1], programs.exp.config.raw)
    checkpoints.wait()
    restored = checkpoints.restore(meshes.STEPS, programs.exp.abstract_state)
    checkpoints.close()
    # The step takes its state's buffers.
    copy = jax.tree.map(lambda leaf: leaf.copy(), state)
    unbroken, gone_on = (programs.train(s, meshes.STEPS)[0] for s in (copy, restored))
    assert pytree.digest(meshes.arrays(s=unbroken)) == pytree.digest(meshes.arrays(s=gone_on))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A short run with its tap at half of the depth."""
    changes = {"model.depth": 3, "model.self_conditioning": {**ON, "scaling": "scalar"}}
    folder = tmp_path_factory.mktemp("run") / "run"
    length = {"train.steps": 4, "checkpoint.every_steps": 4, "log.every_steps": 4}
    modes.run(tiny.settings(changes | length), workdir=str(folder))
    return folder


def lively_pipeline(workdir):
    pipe = ig_jax.load(workdir)
    return replace(pipe, params=lively.parameters(pipe.net))


@pytest.mark.slow
def test_samples_velocity_and_features_see_it(workdir):
    pipe = lively_pipeline(workdir)
    on = pipe.params["self_conditioning"]
    zero = jax.tree.map(np.zeros_like, on)
    without = replace(pipe, params={**pipe.params, "self_conditioning": zero})
    noise = np.random.default_rng(5).normal(size=(3, *pipe.latent_shape)).astype(np.float32)
    labels = [3, 7, 0]

    def computed(pipe):
        velocity, early = pipe.velocity(noise, 0.6, labels)
        tokens = pipe.features(noise, 0.3, (1, 2), labels)
        samples = pipe.sample_latents(labels=labels, noise=noise, ig=1.5, cfg=1.3, steps=2)
        return {"velocity": velocity, "readout": early[1], "samples": samples, **tokens}

    a, b = computed(pipe), computed(without)
    same = {name for name in a if np.array_equal(a[name], b[name])}
    assert same == {"readout", 1} and all(np.isfinite(value).all() for value in a.values())


@pytest.mark.slow
def test_an_export_comes_back_as_the_same_network(workdir, tmp_path):
    file = tmp_path / "out.safetensors"
    export_checkpoint(workdir, file, "raw")
    card = file.with_suffix(".md").read_text()
    assert "self-conditioning from block 1 on (a reading of DDAE++" in card
    assert "no published class: none has these settings: self_conditioning" in card
    names = {n for n in state_dict.read_safetensors(file).state if "self_conditioning" in n}
    layers = ("project.weight", "project.bias", "scale.weight", "scale.bias")
    assert names == {"ig_jax_only.self_conditioning"} | {f"self_conditioning.{n}" for n in layers}
    config = import_checkpoint(file, tmp_path / "again", published.bases())
    assert "'scaling': 'scalar'" in config.read_text()
    before, after = ig_jax.load(workdir, weights="raw"), ig_jax.load(tmp_path / "again")
    assert pytree.digest(after.params) == pytree.digest(before.params)
    settings = before.net.settings
    assert after.net.settings == replace(
        settings, self_conditioning=replace(settings.self_conditioning, tap=1)
    )
    again = tmp_path / "again.safetensors"
    export_checkpoint(tmp_path / "again", again, "ema")
    first, second = (state_dict.read_safetensors(f) for f in (file, again))
    assert pytree.digest(first.state) == pytree.digest(second.state)
    assert first.metadata == second.metadata


def exported(workdir, tmp_path):
    export_checkpoint(workdir, tmp_path / "out.safetensors", "raw")
    return state_dict.read_safetensors(tmp_path / "out.safetensors")


@pytest.mark.slow
def test_an_export_that_lost_its_metadata_or_a_layer_is_refused(workdir, tmp_path):
    read = exported(workdir, tmp_path)
    described = declared.of_metadata(read.metadata)
    for name in ("ig_jax_only.self_conditioning", "self_conditioning.project.weight"):
        rest = {n: array for n, array in read.state.items() if n != name}
        with pytest.raises(UserError, match="self_conditioning.*lost the metadata beside it"):
            detect(rest, declared.UNDECLARED)
    with pytest.raises(UserError, match=r"lacks 'self_conditioning\.project\.weight'"):
        detect(rest, described)


@pytest.mark.parametrize(
    "changes",
    [{"tap": 0}, {"tap": True}, {"scaling": "time"}, {"normalise": 1}, {"more": 1}],
)
def test_metadata_that_describe_no_self_conditioning_are_refused(changes):
    known = {**ON, "tap": 3}
    entry = declared.to_metadata(declared.Declared(self_conditioning=known))
    assert declared.of_metadata(entry).self_conditioning == known
    entry = declared.to_metadata(declared.Declared(self_conditioning=known | changes))
    with pytest.raises(UserError, match="self_conditioning = .*: must be tap, normalise, scaling"):
        declared.of_metadata(entry)
