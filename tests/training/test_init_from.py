"""Starting from another run's weights, and training readouts of a network that stays as it is."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import assert_same_bits

import ig_jax
from ig_jax import modes, pytree
from ig_jax.config.parser import ConfigError
from ig_jax.errors import UserError
from ig_jax.programs import search
from ig_jax.training import init_from, step, trainer

DEPTH = {"model.depth": 3, "train.steps": 8, "checkpoint.every_steps": 4, "log.every_steps": 4}
OFF = {"sample.ig.scale": 1.0, "objective.terms": {"flow": {"weight": 1.0}}}
PLAIN = {**DEPTH, **OFF, "model.readouts": ()}
READOUTS = {**DEPTH, "model.readouts": (1, 2), "train.only": "readouts", "optim.weight_decay": 0.1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without readouts, and its last state."""
    workdir = tmp_path_factory.mktemp("plain")
    return workdir, modes.run(tiny.settings(PLAIN), workdir=workdir).state


@pytest.fixture(scope="module")
def read(plain, tmp_path_factory):
    """Two readouts trained on it, and the last state."""
    workdir = tmp_path_factory.mktemp("readouts")
    outcome = modes.run(tiny.settings(READOUTS), workdir=workdir, init_from=str(plain[0]))
    return workdir, outcome.state


def test_every_bit_of_the_trunk_and_its_averages_is_that_of_the_run_it_came_from(plain, read):
    average, state = plain[1].ema["0.9"], read[1]
    for found in (state.params, *state.ema.values()):
        trunk = {name: values for name, values in found.items() if name != "heads"}
        assert_same_bits(trunk, {name: values for name, values in average.items() if name in trunk})
    assert trunk.keys() | {"heads"} == state.params.keys()


def test_the_readouts_are_trained_and_averaged_and_the_optimizer_has_nothing_else(read):
    state = read[1]
    exp = tiny.experiment(READOUTS)
    fresh = exp.fresh_state().params["heads"]
    for path, leaf in pytree.flatten(state.params["heads"]).items():
        raw, begun = np.asarray(leaf), np.asarray(pytree.flatten(fresh)[path])
        assert np.abs(raw - begun).max() > 1e-3, path
        for average in state.ema.values():
            assert 0 < np.abs(np.asarray(pytree.flatten(average["heads"])[path]) - raw).max(), path
    moments = [m for m in jax.tree.leaves(state.opt_state) if m.ndim]
    heads = [leaf.shape for leaf in jax.tree.leaves(state.params["heads"])]
    assert sorted(m.shape for m in moments) == sorted(2 * heads)


@pytest.mark.slow
def test_samples_without_internal_guidance_are_those_of_before_and_any_readout_guides(plain, read):
    before, after = ig_jax.load(plain[0]), ig_jax.load(read[0])
    asked = {"labels": [3, 1, 4], "seed": 5, "cfg": 1.5}
    expected = before.sample_latents(**asked)
    np.testing.assert_array_equal(after.sample_latents(ig=1.0, **asked), expected)
    guided = [after.sample_latents(ig=2.0, readout=depth, **asked) for depth in (1, 2)]
    assert all(np.abs(g - expected).max() > 1e-3 for g in guided)
    assert np.abs(guided[0] - guided[1]).max() > 1e-5  # both have learnt little yet
    np.testing.assert_array_equal(after.sample_latents(ig=2.0, **asked), guided[0])
    with pytest.raises(UserError, match="readout = 3: must be one of 1, 2"):
        after.sample_latents(ig=2.0, readout=3, **asked)
    with pytest.raises(UserError, match="readout = 1: must be left out"):
        before.sample_latents(readout=1, **asked)


@pytest.mark.slow
def test_self_conditioning_can_be_added_and_changes_nothing_at_first(plain, capsys):
    on = {"tap": 1, "normalise": True, "scaling": "channels", "stop_gradient": False}
    exp = tiny.experiment({**PLAIN, "model.self_conditioning": on})
    state, _ = init_from.start(exp, {"workdir": str(plain[0]), "step": None})
    assert "; fresh self-conditioning" in capsys.readouterr().out
    average = plain[1].ema["0.9"]
    assert_same_bits({name: state.params[name] for name in average}, average)
    assert state.params.keys() - average.keys() == {"self_conditioning"}
    x, y = jnp.ones((2, *exp.net.latent_shape)), jnp.array([3, 10])
    inputs = x, jnp.array([0.3, 0.8]), y
    expected = tiny.experiment(PLAIN).net(average, *inputs).pred
    np.testing.assert_allclose(exp.net(state.params, *inputs).pred, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_bits(plain, read, tmp_path):
    changes = {**READOUTS, "train.steps": 4}
    modes.run(tiny.settings(changes), workdir=tmp_path, init_from=str(plain[0]))
    resumed = modes.run(tiny.settings(READOUTS), workdir=tmp_path)  # the flag is not needed again
    assert_same_bits(resumed.state, read[1])
    record = json.loads((tmp_path / "config.json").read_text())["init_from"]
    assert record == {"workdir": str(plain[0]), "step": 8}


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_starts_from_the_same_weights(plain, tmp_path):
    exp = tiny.experiment(READOUTS)
    trainer.Trainer(exp, tmp_path, init_from=f"{plain[0]}@4").close()
    again = trainer.Trainer(exp, tmp_path)
    again.close()
    assert_same_bits(again.state.params["blocks"], ig_jax.load(plain[0], step=4).params["blocks"])


def gradient(exp):
    """The gradient of the objective, and what it takes."""
    state, batch = exp.abstract_state, exp.config.train.batch_size
    x0 = jax.ShapeDtypeStruct((batch, *exp.net.latent_shape), jnp.float32)
    draws = jax.eval_shape(exp.objective.draw, jax.random.key(0), x0)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    noised = step.Noised(x0, labels, draws)
    averaged = state.ema["0.9"]
    return partial(step.gradients, objective=exp.objective), (
        state.trained,
        noised,
        averaged,
        0,
        state.frozen,
    )


@pytest.mark.slow
def test_no_backward_pass_goes_through_the_trunk():
    """Compiled, in FLOPs: one forward pass and the readouts; and so on paper."""
    sizes = {**DEPTH, "model.hidden_size": 64, "model.unroll": 3}
    compiled, paper = {}, {}
    for name, only in (("readouts", "readouts"), ("all", None)):
        exp = tiny.experiment({**sizes, "train.only": only}, jax.devices()[:1])
        fn, given = gradient(exp)
        compiled[name] = jax.jit(fn).lower(*given).compile().cost_analysis()["flops"]
        paper[name] = exp.gradient_flops(exp.config.train.batch_size)
    assert 0.3 < compiled["readouts"] / compiled["all"] < 0.45
    for name in compiled:
        assert compiled[name] == pytest.approx(paper[name], rel=0.15)


@pytest.mark.slow
def test_two_devices_that_share_the_parameters_compute_the_same(plain):
    def two_steps(changes, devices):
        exp = tiny.experiment({**READOUTS, **changes}, devices)
        state, _ = init_from.start(exp, init_from.parsed(str(plain[0])))
        rng = np.random.default_rng(3)
        stored = rng.normal(size=(2, 16, 8, 8, 1)).astype(np.float32)
        batches = {"stored": stored, "label": rng.integers(0, 10, (2, 16)).astype(np.int32)}
        state, metrics = step.make_dispatch(exp)(state, batches, {})
        return jax.tree.map(np.asarray, (state.params, metrics["loss"].value))

    one = two_steps({}, jax.devices()[:1])
    two = two_steps({"mesh.data": 1, "mesh.fsdp": 2, "model.remat": "full"}, jax.devices()[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), one, two)
    assert_same_bits(one[0]["blocks"], two[0]["blocks"])


@pytest.mark.slow
def test_all_of_a_network_can_start_from_another_run(plain, tmp_path):
    """Fine-tuning: other data order, optimizer and averages; no readout is lost or needed."""
    changes = {**PLAIN, "seed": 3, "train.ema_decays": (0.5,), "train.steps": 4}
    exp = tiny.experiment(changes)
    state, at = init_from.start(exp, {"workdir": str(plain[0]), "step": 4})
    expected = ig_jax.load(plain[0], step=4).params
    assert at == 4
    assert_same_bits(state.params, expected)
    assert_same_bits(state.ema["0.5"], expected)


@pytest.mark.parametrize(
    ("changes", "given", "says"),
    [
        ({}, None, "train.only = 'readouts': .* name its run with --init_from=WORKDIR"),
        ({}, "{}@5", r"--init_from = 5: .* only 4, 8"),
        ({}, "{}/none", "--init_from=.*none: holds no checkpoint"),
        ({"model.hidden_size": 20}, "{}", r"of another network \(model.hidden_size"),
        ({"model.qk_norm": True}, "{}", r"of another network \(model.qk_norm"),
    ],
)
def test_what_a_run_cannot_start_from_is_refused_in_a_sentence(
    plain, tmp_path, changes, given, says
):
    source = given and given.format(plain[0])
    with pytest.raises(UserError, match=says):
        modes.run(tiny.settings({**READOUTS, **changes}), workdir=tmp_path, init_from=source)


def test_a_run_that_has_begun_is_not_started_from_elsewhere(plain, read):
    for source in (str(read[0]), f"{plain[0]}@4"):
        with pytest.raises(UserError, match=f"has begun from {plain[0]}@8; leave the flag out"):
            modes.run(tiny.settings(READOUTS), workdir=read[0], init_from=source)
    with pytest.raises(UserError, match="has begun from other weights"):
        modes.run(tiny.settings(PLAIN), workdir=plain[0], init_from=str(read[0]))


def test_other_modes_and_configs_without_readouts_are_refused():
    with pytest.raises(UserError, match="--init_from: is for train and demo, not for --mode=sam"):
        modes.run(tiny.settings(), workdir="x", mode="sample", init_from="y")
    with pytest.raises(ConfigError, match="train.only = 'readouts': objective.terms has no int"):
        tiny.experiment({**READOUTS, "objective.terms": {"flow": {"weight": 1.0}}})
    with pytest.raises(ConfigError, match="train.only = 'heads': must be readouts, or None"):
        tiny.experiment({"train.only": "heads"})


def test_a_folder_whose_name_ends_like_a_step_is_a_folder(tmp_path):
    named = tmp_path / "run@12"
    assert init_from.parsed(str(named)) == {"workdir": str(tmp_path / "run"), "step": 12}
    named.mkdir()
    assert init_from.parsed(str(named)) == {"workdir": str(named), "step": None}


def test_a_search_goes_over_readouts_too():
    def compared(readouts):
        values = {"ig": {"scale": (1.0, 2.0)}, "readout": readouts}
        space = {"method": "grid", "candidates": 4, "values": values}
        return search.compared(tiny.experiment({**READOUTS, "search.space": space}).config)

    tried = {(c.values["ig.scale"], c.values["readout"]) for c in compared((1, 2))}
    assert tried == {(1, 1), (2, 1), (2, 2)}  # without guidance there is nothing to read
    c = tiny.experiment(READOUTS).config
    readout = search.apply_candidate(c.sample, compared((1, 2))[-1], c.model.readouts).readout
    assert readout == 2 and isinstance(readout, int)
    with pytest.raises(UserError, match="readout=3: must name a depth of model.readouts"):
        compared((1, 3))
