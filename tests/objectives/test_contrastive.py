"""Contrastive self-distillation against NumPy's float64: heads, loss, devices, who learns."""

import os
import subprocess
import sys
from functools import partial

import contrast
import cpu_devices
import jax
import jax.numpy as jnp
import lively
import numpy as np
import optax
import pytest
import tiny
from contrast import TAU, B, F, H, by_formula, case, loss
from vectors import quick_jit

from ig_jax import pytree
from ig_jax.config import run_config
from ig_jax.config.run_config import ConfigError
from ig_jax.diffusion.flow import Flow
from ig_jax.monitoring import flops
from ig_jax.objectives import TERMS, contrastive, heads
from ig_jax.objectives.base import NoisedBatch, Objective, Teacher
from ig_jax.optim import skip_spikes
from ig_jax.optim.train_state import TrainState, trained
from ig_jax.parallel.mesh import to_global
from ig_jax.training import step
from ig_jax.types import NetOutput, OneDevice

NORMS = ("batch", "layer")
FIELDS = {"weight": 0.1, "depth": 1, "hidden_size": 16, "features": 8}


def tiny_terms(**changes) -> dict:
    return {"objective.terms": {"flow": {"weight": 1.0}, "contrastive": {**FIELDS, **changes}}}


# The loss.


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_is_that_of_the_formula(norm):
    made = case()
    expected = by_formula(made, norm)
    assert np.ptp(expected) > 0.2  # images differ, and so do the norms
    np.testing.assert_allclose(loss(made, norm=norm), expected, rtol=1e-5)
    np.testing.assert_allclose(
        loss(made, norm=norm, tau=0.7), by_formula(made, norm, 0.7), rtol=1e-5
    )


def test_images_of_one_feature_cost_two_tau_times_the_log_of_their_number():
    """The start: nothing is told from anything."""
    made = case()
    for view in ("student", "teacher"):
        made[view] = np.repeat(made[view][:1], B, axis=0)
    np.testing.assert_allclose(loss(made), np.full(B, 2 * TAU * np.log(B)), rtol=1e-6)


def test_features_that_only_agree_with_their_own_cost_next_to_nothing():
    """Of orthogonal features one product is 1 and B - 1 are 0, or the one is another's."""
    unit, tau = jnp.eye(B), 0.2
    own = contrastive.info_nce(unit, unit, tau, OneDevice())
    np.testing.assert_allclose(own, np.full(B, 2 * tau * np.log1p((B - 1) * np.exp(-5))), rtol=1e-5)
    others = contrastive.info_nce(unit, jnp.roll(unit, 1, axis=0), tau, OneDevice())
    np.testing.assert_allclose(others, own + 2, rtol=1e-5)


def test_permuted_images_have_permuted_losses():
    made, order = case(), np.random.default_rng(3).permutation(B)
    moved = {**made, **{view: made[view][order] for view in ("student", "teacher")}}
    np.testing.assert_allclose(loss(moved), np.asarray(loss(made))[order], rtol=1e-5)


def test_permuted_tokens_leave_the_feature_and_their_size_does_too():
    tokens = case()["student"]
    feature = contrastive.pool(jnp.asarray(tokens))
    np.testing.assert_allclose(contrastive.pool(jnp.asarray(tokens[:, ::-1])), feature, atol=1e-6)
    np.testing.assert_allclose(contrastive.pool(jnp.asarray(9 * tokens)), feature, atol=1e-5)
    expected = contrast.normalized(tokens.astype(np.float64), 2, 1e-6).mean(axis=1)
    np.testing.assert_allclose(feature, expected, atol=1e-6)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_formula():
    made = case(1)
    gradient = jax.grad(lambda s, h: jnp.mean(loss({**made, "student": s, "head": h})), (0, 1))
    found = quick_jit(gradient)(made["student"], made["head"])
    rng = np.random.default_rng(2)
    move = jax.tree.map(lambda x: rng.standard_normal(x.shape), (made["student"], made["head"]))

    def moved(by: float) -> float:
        student, head = jax.tree.map(
            lambda x, m: x.astype(np.float64) + by * m, (made["student"], made["head"]), move
        )
        return np.mean(by_formula({**made, "student": student, "head": head}))

    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, m: np.sum(g * m), found, move)))
    assert slope == pytest.approx(expected, rel=1e-3)


def test_batch_norm_is_over_images_and_layer_norm_over_values():
    x = 4 + np.random.default_rng(5).standard_normal((6, 3)).astype(np.float32) * [0.002, 1, 30]
    x = jnp.asarray(x, jnp.float32)
    exact = np.asarray(x, np.float64)
    expected = contrast.normalized(exact, 0, 1e-5)
    np.testing.assert_allclose(heads.batch_norm(x, OneDevice()), expected, rtol=1e-3, atol=1e-5)
    expected = contrast.normalized(exact, 1, 1e-5)
    np.testing.assert_allclose(heads.layer_norm(x, epsilon=1e-5), expected, rtol=1e-4, atol=1e-5)


def test_heads_begin_as_moco_v3s_without_biases_of_layers_and_without_a_last_norms_parameters():
    net = lively.make()
    head = TERMS["contrastive"](0.1, 2, hidden_size=10, features=6).init(jax.random.key(0), net)
    shapes = jax.tree.map(lambda x: x.shape, head)
    norm = {"scale": (10,), "bias": (10,)}
    assert shapes == {
        "projector": {
            "fc1": {"kernel": (24, 10)},
            "norm1": norm,
            "fc2": {"kernel": (10, 10)},
            "norm2": norm,
            "fc3": {"kernel": (10, 6)},
        },
        "predictor": {"fc1": {"kernel": (6, 10)}, "norm1": norm, "fc2": {"kernel": (10, 6)}},
    }
    np.testing.assert_array_equal(head["projector"]["norm2"]["scale"], np.ones(10))
    assert not np.any(head["predictor"]["norm1"]["bias"])


# Devices.


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    file = tmp_path_factory.mktemp("contrast") / "found.npz"
    environ = os.environ | {
        "XLA_FLAGS": cpu_devices.xla_flags(8),
        "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests/helpers")]),
    }
    command = [sys.executable, contrast.__file__, str(file)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return np.load(file)


@pytest.mark.parametrize("shape", contrast.SHAPES, ids=str)
def test_one_two_and_eight_devices_compare_all_images_of_the_batch(meshes, shape):
    np.testing.assert_allclose(meshes[f"{shape} losses"], by_formula(case()), rtol=1e-5)
    one = contrast.SHAPES[0]
    names = [n.removeprefix(f"{one} ") for n in meshes.files if n.startswith(f"{one} ")]
    assert len(names) == 13
    for name in names:
        np.testing.assert_allclose(
            meshes[f"{shape} {name}"], meshes[f"{one} {name}"], rtol=2e-4, atol=2e-6, err_msg=name
        )


@pytest.fixture(scope="module")
def trained_on_one():
    return advanced(1, {"data": 1, "fsdp": 1, "tensor": 1})


def advanced(devices: int, mesh: dict[str, int], **changes):
    """The state before a step and after it, and its metrics."""
    # A large epsilon: where a gradient is rounding alone, Adam must not make a step of it.
    optim = {**tiny.get_config().optim.to_dict(), "eps": 1e-2, "warmup_steps": 0}
    every = {"mesh": mesh, "model.remat": "dots", "optim": optim, "objective.teacher_decay": 0.8}
    exp = tiny.experiment({**tiny_terms(), **every, **changes}, jax.devices()[:devices])
    source, size = exp.config.data.source, exp.config.train.batch_size
    batch = to_global(source.batch(np.arange(size)[::-1]), exp.mesh, size)
    before = step.init_state(exp)
    update = quick_jit(partial(step.train_step, exp=exp))
    return jax.tree.map(np.asarray, (before, *update(before, batch)))


@pytest.mark.slow
def test_two_devices_take_the_step_of_one(trained_on_one):
    _, state, found = trained_on_one
    _, state_2, found_2 = advanced(2, {"data": 1, "fsdp": 2, "tensor": 1})
    for name in ("loss/contrastive", "grad_norm"):
        np.testing.assert_allclose(found_2[name].value, found[name].value, rtol=1e-5)
    near = partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(near, state_2.trained, state.trained)
    jax.tree.map(near, state_2.ema_terms, state.ema_terms)


def test_the_heads_of_the_teacher_are_split_over_devices_as_those_that_are_trained():
    changes = {"mesh": {"data": 1, "fsdp": 2, "tensor": 1}, "model.remat": "dots"}
    state = tiny.experiment({**tiny_terms(), **changes}).abstract_state
    for heads_of in (state.terms, state.ema_terms):
        kernel = heads_of["contrastive"]["projector"]["fc2"]["kernel"]
        assert kernel.shape == (16, 16) and kernel.sharding.shard_shape((16, 16)) == (8, 16)


# The teacher.


@pytest.mark.slow
def test_the_teachers_projector_is_an_average_of_the_teachers_decay(trained_on_one):
    """And starts as a copy of what is trained."""
    before, after, _ = trained_on_one
    start = before.terms["contrastive"]["projector"]
    jax.tree.map(
        np.testing.assert_array_equal, before.ema_terms, {"contrastive": {"projector": start}}
    )
    assert list(after.ema_terms["contrastive"]) == ["projector"]
    old, new = (s.terms["contrastive"]["projector"] for s in (before, after))
    averaged = after.ema_terms["contrastive"]["projector"]
    for path, leaf in pytree.flatten(averaged).items():
        first, second = pytree.flatten(old)[path], pytree.flatten(new)[path]
        np.testing.assert_allclose(leaf, 0.8 * first + 0.2 * second, rtol=1e-6, err_msg=path)
        assert np.any(first != second)


def test_a_skipped_update_leaves_the_teachers_projector():
    optimizer = skip_spikes(optax.sgd(1.0), 2.0)
    params, terms = {"a": jnp.ones(3)}, {"contrastive": {"projector": {"scale": jnp.ones(2)}}}
    averages, heads_of = {"0.8": {"a": jnp.zeros(3)}}, jax.tree.map(jnp.zeros_like, terms)
    opt_state = optimizer.init(trained(params, terms))
    state = TrainState(jnp.int32(0), params, opt_state, averages, terms, ema_terms=heads_of)

    def updated(gradient: float):
        def gradients(params, batch, teacher, number, frozen):
            assert teacher is not None and list(teacher["terms"]) == ["contrastive"]
            return jax.tree.map(lambda x: jnp.full_like(x, gradient), params), {}

        settings = {"optimizer": optimizer, "teacher_decay": 0.8, "gradients": gradients}
        after, _ = step.update_state(state, step.Noised(None, None, None), **settings)
        return after.ema_terms["contrastive"]["projector"]["scale"]

    np.testing.assert_array_equal(updated(np.nan), np.zeros(2))
    np.testing.assert_allclose(updated(-0.5), np.full(2, 0.2 * 1.5), rtol=1e-6)


@pytest.mark.parametrize("view", contrastive.VIEWS)
def test_the_teacher_sees_the_other_view_at_its_own_time_and_noise_with_the_label(view):
    rng, seen = np.random.default_rng(0), []
    x0, mirrored, noise, own = rng.standard_normal((4, B, 2, 2, 1)).astype(np.float32)
    made, labels = case(), jnp.arange(B)

    def tokens(*inputs):
        seen.append(inputs)
        return {1: jnp.asarray(made["teacher"])}

    batch = NoisedBatch(
        *map(jnp.asarray, (x0, noise)),
        t=jnp.linspace(0, 1, B),
        x_t=jnp.asarray(x0),
        y=jnp.full(B, 10),
        target=jnp.asarray(x0),
        out=NetOutput(jnp.asarray(x0), {}, {1: jnp.asarray(made["student"])}),
        teacher=Teacher(tokens, tokens, made["averaged"]),
        process=Flow("linear", "uniform"),
        labels=labels,
        mirrored=jnp.asarray(mirrored),
    )
    term = TERMS["contrastive"](0.1, 1, teacher_time=0.3, view=view, hidden_size=H, features=F)
    term(batch, made["head"], jnp.asarray(own))
    [(x_t, t, y, ids, depths)] = seen
    data = {"mirrored": mirrored, "same": x0}[view]
    np.testing.assert_allclose(x_t, 0.7 * data + 0.3 * own, rtol=1e-5)
    np.testing.assert_allclose(t, np.full(B, 0.3))
    np.testing.assert_array_equal(y, labels)
    assert ids is None and depths == (1,)
    assert term.needs.mirrored == (view == "mirrored")


@pytest.mark.slow
def test_only_what_leads_to_the_tap_and_the_heads_learn():
    net, terms = lively.make(), {"contrastive": TERMS["contrastive"](1.0, 2, hidden_size=9)}
    loss = Objective(net, Flow("linear", "uniform"), terms, 0.5, lively.CLASSES)
    x, _, y = lively.inputs(net, batch=6)
    params, teacher = lively.parameters(net), jax.tree.map(jnp.negative, lively.parameters(net))
    both = trained(params, loss.init(jax.random.key(0)))
    averages = trained(teacher, loss.averaged(loss.init(jax.random.key(1))))
    draws = loss.draw(jax.random.key(2), x)

    def total(params, averages):
        return loss(params, x, y, draws, averages, mirrored=x[:, :, ::-1])[0]

    of_student, of_teacher = quick_jit(jax.grad(total, (0, 1)))(both, averages)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    for path, leaf in pytree.flatten(of_student).items():
        if path.startswith("blocks."):
            assert np.any(leaf[0]) and np.any(leaf[1]) and not np.any(leaf[2]), path
        else:
            reached = path.startswith(("x_embedder", "t_embedder", "y_embedder", "terms", "pos"))
            assert np.any(leaf) == reached, path


def test_without_the_term_there_are_no_averages_of_heads_and_no_second_view():
    exp = tiny.experiment()
    assert exp.abstract_state.ema_terms == {} and not exp.objective.mirrors
    rows = {"stored": jnp.zeros((2, 8, 8, 1), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}
    assert step.noise(exp, rows, 0).mirrored is None
    exp = tiny.experiment(tiny_terms())
    stored = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    found = step.noise(exp, {**rows, "stored": jnp.asarray(stored)}, 0)
    np.testing.assert_array_equal(found.mirrored, np.asarray(found.x0)[:, :, ::-1])
    assert not np.array_equal(found.draws.terms["contrastive"], found.draws.noise)


def test_flops_are_those_of_heads_that_see_one_vector_an_image_and_of_the_teachers_blocks():
    net, terms = lively.make(), {"contrastive": TERMS["contrastive"](1.0, 2, hidden_size=9)}
    loss = Objective(net, Flow("linear", "uniform"), terms, 0.0, lively.CLASSES)
    heads_of = jax.eval_shape(loss.init, jax.random.key(0))
    projector, predictor = 24 * 9 + 9 * 9 + 9 * 256, 256 * 9 + 9 * 256
    params = lively.abstract(net)
    found = flops.of_train_step(
        net,
        params,
        7,
        heads_of,
        loss.teacher_passes,
        pooled=["contrastive"],
        averaged=loss.averaged(heads_of),
    )
    plain = flops.of_train_step(net, params, 7)
    teacher = flops.to_block(net, params, 2) + 2 * projector
    assert found - plain == 7 * (3 * 2 * (projector + predictor) + teacher)
    exp = tiny.experiment(tiny_terms())
    projector, predictor = 16 * 16 + 16 * 16 + 16 * 8, 8 * 16 + 16 * 8
    added = exp.gradient_flops(3) - tiny.experiment(
        {"objective.terms": {"flow": {"weight": 1.0}}}
    ).gradient_flops(3)
    teacher = flops.to_block(exp.net, exp.abstract_params, 1) + 2 * projector
    assert added == 3 * (6 * (projector + predictor) + teacher)


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "contrastive: reads the tokens of block 3, which must lie in 1..2"),
        ({"depth": 0}, "contrastive: reads the tokens of block 0, which must lie in 1..2"),
        ({"tau": 0.0}, "contrastive.tau = 0.0: must be above 0"),
        ({"teacher_time": 1.5}, "contrastive.teacher_time = 1.5: must lie in"),
        ({"view": "flipped"}, "contrastive.view = 'flipped': must be one of mirrored, same"),
        ({"norm": "group"}, "contrastive.norm = 'group': must be one of batch, layer"),
        ({"hidden_size": 0}, "contrastive.hidden_size = 0: must be at least 1"),
        ({"features": 1}, "contrastive.features = 1: must be at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        run_config.parse(tiny.settings(tiny_terms(**changes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 1}, "compares the images of a batch, but train.batch_size = 1; use"),
        ({"train.accumulation": 2}, "but train.accumulation = 2 parts are never seen together"),
    ],
)
def test_a_batch_of_one_or_in_parts_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^objective.terms.contrastive: .*{message}"):
        run_config.parse(tiny.settings({**tiny_terms(), **changes}))
