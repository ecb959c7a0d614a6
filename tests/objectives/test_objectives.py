"""Terms of the loss against their formulas, and the log of losses by time.

The network here is made up: two heads whose parameters are their outputs. What training makes of
them can then be worked out by hand.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but
from vectors import quick_jit

from ig_jax.diffusion.flow import Flow
from ig_jax.objectives import TERMS
from ig_jax.objectives.acceleration import AcceleratedFlow
from ig_jax.objectives.base import Draws, NoisedBatch, Objective
from ig_jax.objectives.metrics import Mean, add_steps, logged, mean_by_time
from ig_jax.training.step import Noised, gradients
from ig_jax.types import NetOutput

LINEAR = Flow("linear", "uniform")
B, SHAPE = 4, (4, 2, 2, 3)
T = np.array([0.05, 0.3, 0.35, 0.999])


def normal(seed: int, shape=SHAPE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def single(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def net(params, x, t, y, *, taps=()):
    """Heads that share `shared`, so that a gradient through the wrong one would show."""
    inside = jnp.tanh(x * params["shared"])
    return NetOutput(
        pred=inside * params["final"], heads={1: inside * params["early"]}, features={}
    )


def parameters(seed: int):
    names = ("shared", "final", "early")
    return {name: normal(seed + i, (1, 2, 2, 3)) for i, name in enumerate(names)}


def batch():
    """x0, labels and draws, whose times are T."""
    draws = Draws(time=jnp.asarray(T), noise=normal(1), drop=jnp.ones(B))
    return normal(0), jnp.zeros(B, jnp.int32), draws


def objective(process=LINEAR, **terms) -> Objective:
    return Objective(net=net, process=process, terms=terms, label_drop=0.0, null_class=9)


def accelerated(omega: float, bias: str = "network", weight: float = 1.0) -> Objective:
    return objective(accelerated_flow=AcceleratedFlow(weight, omega, bias))


def loss_and_gradient(objective: Objective, params, teacher=None):
    """The total and its gradient on `batch`, eagerly: nothing is fused, so bits can be compared."""
    x0, labels, draws = batch()
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(
        params, x0, labels, draws, teacher
    )
    return loss, gradient, metrics


def assert_same_bits(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# Acceleration.


@pytest.mark.parametrize("bias", slow_but(["ema"], ["network", "ema"]))
def test_acceleration_by_0_is_flow_matching_bit_for_bit(bias):
    params, teacher = parameters(2), parameters(20)
    plain = loss_and_gradient(objective(flow=TERMS["flow"](weight=1.0)), params)
    found = loss_and_gradient(accelerated(0.0, bias), params, teacher)
    assert_same_bits(found[:2], plain[:2])
    other = loss_and_gradient(accelerated(0.1, bias), params, teacher)
    assert other[0] != plain[0]


@pytest.mark.parametrize("bias", ["network", "ema"])
def test_the_loss_is_the_squared_distance_to_the_target_moved_by_omega_times_the_bias(bias):
    params, teacher = parameters(2), parameters(20)
    x0, _, draws = batch()
    t = T[:, None, None, None]
    x_t, v = (1 - t) * x0 + t * draws.noise, draws.noise - x0
    biased = params if bias == "network" else teacher

    def inside(p):
        return np.tanh(x_t * p["shared"])

    moved = v + 0.7 * inside(biased) * (biased["final"] - biased["early"])
    expected = np.mean((inside(params) * params["final"] - moved) ** 2)
    found = loss_and_gradient(accelerated(0.7, bias), params, teacher)[2]
    assert found["loss/accelerated_flow"].value == pytest.approx(float(expected), rel=1e-12)


def held_constant(params, omega: float):
    """The loss with the bias of `params` as a constant, and as a function of new parameters."""
    x0, labels, draws = batch()
    p = accelerated(omega).forward(params, x0, labels, draws)
    target = np.asarray(p.target + omega * (p.out.pred - p.out.heads[1]))

    def loss(new):
        return jnp.mean((net(new, p.x_t, p.t, p.y).pred - target) ** 2)

    return loss


def moved(params, step: float, direction):
    return jax.tree.map(lambda p, d: p + step * d, params, direction)


def test_the_gradient_is_that_of_the_loss_with_the_bias_held_constant():
    params = parameters(2)
    loss = held_constant(params, 0.7)
    _, gradient, _ = loss_and_gradient(accelerated(0.7), params)
    expected = jax.grad(loss)(params)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-12), gradient, expected)
    direction, h = parameters(40), 1e-6
    ahead, behind = (loss(moved(params, step, direction)) for step in (h, -h))
    along = sum(jnp.sum(gradient[name] * direction[name]) for name in gradient)
    assert along == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("bias", ["network", "ema"])
def test_no_gradient_reaches_the_bias(bias):
    teacher = parameters(20)
    _, gradient, _ = loss_and_gradient(accelerated(0.7, bias), parameters(2), teacher)
    assert np.all(gradient["early"] == 0)
    assert np.all(gradient["final"] != 0) and np.all(gradient["shared"] != 0)

    def through_teacher(teacher):
        return accelerated(0.7, bias)(parameters(2), *batch(), teacher)[0]

    assert all(np.all(g == 0) for g in jax.tree.leaves(jax.grad(through_teacher)(teacher)))


def test_the_averaged_bias_is_that_of_the_averaged_weights_and_not_of_the_live_ones():
    params, teacher, other = parameters(2), parameters(20), parameters(30)
    x0, labels, draws = batch()
    base = accelerated(0.7, "ema").forward(params, x0, labels, draws, teacher)
    moved = replace(base, out=base.out.replace(heads={1: base.out.heads[1] + 1.0}))
    term = AcceleratedFlow(1.0, 0.7, "ema")
    assert_same_bits(term(moved), term(base))  # the live readout is not looked at
    losses = [
        loss_and_gradient(accelerated(0.7, "ema"), params, weights)[0]
        for weights in (teacher, other, params)
    ]
    assert len(set(map(float, losses))) == 3
    assert losses[2] == loss_and_gradient(accelerated(0.7, "network"), params)[0]


def test_the_network_is_asked_again_only_for_an_averaged_bias():
    asked = []

    def counting(params, *inputs, **taps):
        asked.append(params)
        return net(params, *inputs, **taps)

    for bias, count in (("network", 1), ("ema", 2)):
        asked.clear()
        replace(accelerated(0.7, bias), net=counting)(parameters(2), *batch(), parameters(20))
        assert len(asked) == count


@pytest.mark.parametrize("omega", [0.0, 0.3, 0.6])
def test_training_settles_where_the_final_output_is_an_extrapolation_from_the_readout(omega):
    """Two numbers learn v = 2, the readout held back at 1.5: (v - early) / (1 - omega) above it."""
    v, early = 2.0, 1.5
    term = AcceleratedFlow(1.0, omega, "network")

    def loss(final):
        pred, target = (jnp.full((1, 1, 1, 1), x) for x in (final, v))
        out = NetOutput(pred=pred, heads={1: jnp.full_like(pred, early)}, features={})
        fixed = {"x0": target, "noise": target, "t": jnp.ones(1), "x_t": target}
        return term(NoisedBatch(**fixed, y=jnp.zeros(1, jnp.int32), target=target, out=out))[0]

    step = quick_jit(lambda final: final - 0.1 * jax.grad(loss)(final))
    final = jnp.float64(0.0)
    for _ in range(400):
        final = step(final)
    assert final - early == pytest.approx((v - early) / (1 - omega), rel=1e-6)


@pytest.mark.parametrize("omega", [1.0, 1.5, -0.1, np.nan])
def test_an_omega_at_which_the_target_runs_away_is_refused(omega):
    with pytest.raises(ValueError, match=rf"omega = {omega}: must lie in \[0, 1\)"):
        AcceleratedFlow(1.0, omega, "network")


def test_a_bias_of_nobody_is_refused():
    with pytest.raises(ValueError, match="bias = 'teacher': must be one of network, ema"):
        AcceleratedFlow(1.0, 0.5, "teacher")


@pytest.mark.parametrize(
    ("readout", "readouts", "message"),
    [
        (0, (), "model.readouts is empty"),
        (2, (1,), r"readout = 2: must be one of model.readouts = \(1,\)"),
        (0, (2, 1), r"readout = 0: must be one of model.readouts = \(2, 1\)"),
    ],
)
def test_a_readout_that_the_network_lacks_or_that_is_left_open_is_refused(
    readout, readouts, message
):
    term = AcceleratedFlow(1.0, 0.5, "network", readout)
    with pytest.raises(ValueError, match=message):
        term.check(readouts)


@pytest.mark.parametrize(("readout", "readouts"), [(0, (3,)), (3, (3,)), (1, (2, 1))])
def test_the_only_readout_or_a_named_one_is_accepted(readout, readouts):
    AcceleratedFlow(1.0, 0.5, "network", readout).check(readouts)


def test_the_named_readout_is_the_one_that_biases():
    target = jnp.zeros(SHAPE)
    out = NetOutput(pred=target, heads={1: target + 1.0, 2: target + 3.0}, features={})
    fixed = {"x0": target, "noise": target, "t": jnp.ones(B), "x_t": target}
    p = NoisedBatch(**fixed, y=jnp.zeros(B, jnp.int32), target=target, out=out)
    for readout, bias in ((1, 1.0), (2, 3.0)):
        found = AcceleratedFlow(1.0, 0.5, "network", readout)(p)
        np.testing.assert_allclose(found, (0.5 * bias) ** 2)


# Direction.


def cosine(pred, target) -> np.ndarray:
    out = NetOutput(pred=pred, heads={}, features={})
    fixed = {"x0": target, "noise": target, "t": jnp.ones(len(pred)), "x_t": target}
    p = NoisedBatch(**fixed, y=jnp.zeros(len(pred), jnp.int32), target=target, out=out)
    return np.asarray(TERMS["cosine"](weight=1.0)(p))


def test_the_direction_costs_0_where_parallel_2_where_opposite_and_1_at_a_right_angle():
    target = normal(0)
    across = jnp.cross(target, normal(1))
    for pred, expected in ((3 * target, 0), (-0.1 * target, 2), (across, 1)):
        np.testing.assert_allclose(cosine(pred, target), np.full(B, expected), atol=1e-12)


def test_the_direction_does_not_see_the_scale_of_any_position():
    pred, target = normal(0), normal(1)
    scale = jnp.exp(normal(2, (B, 2, 2, 1)))
    np.testing.assert_allclose(cosine(scale * pred, target), cosine(pred, target), rtol=1e-12)
    assert not np.allclose(cosine(normal(2) * pred, target), cosine(pred, target))


def test_every_example_has_the_mean_over_its_positions():
    target = normal(0)
    pred = target.at[1, 0, 0].multiply(-1.0)  # one of four positions opposite
    np.testing.assert_allclose(cosine(pred, target), [0, 0.5, 0, 0], atol=1e-12)


def test_the_gradient_of_the_direction_is_finite_at_a_prediction_of_zero():
    target, zero = single(normal(0)), jnp.zeros(SHAPE, jnp.float32)

    def loss(pred):
        out = NetOutput(pred=pred, heads={}, features={})
        fixed = {"x0": target, "noise": target, "t": jnp.ones(B), "x_t": target}
        p = NoisedBatch(**fixed, y=jnp.zeros(B, jnp.int32), target=target, out=out)
        return jnp.mean(TERMS["cosine"](weight=1.0)(p))

    gradient = jax.grad(loss)(zero)
    assert np.all(np.isfinite(gradient)) and loss(zero) == 1
    # It points away from the target, however long it is.
    along = jnp.sum(gradient * target, axis=-1)
    across = jnp.linalg.norm(jnp.cross(gradient, target), axis=-1)
    assert np.all(along < 0) and np.all(across < 1e-5 * -along)


def test_the_direction_is_a_term_of_the_final_output_alone():
    terms = {"cosine": TERMS["cosine"](weight=2.0)}
    loss, gradient, metrics = loss_and_gradient(objective(**terms), parameters(2))
    assert loss == 2 * metrics["loss/cosine"].value and np.all(gradient["early"] == 0)


# Losses by time.

TWO_TERMS = {"flow": TERMS["flow"](1.0), "internal_guidance": TERMS["internal_guidance"](0.5)}


def test_every_example_is_in_the_bucket_of_its_time_and_time_1_in_the_last():
    times = jnp.array([0.0, 0.0999, 0.1, 0.55, 0.9, 1.0, 0.95])
    values = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    found = mean_by_time(values, times)
    np.testing.assert_array_equal(found.total, [3, 4, 0, 0, 0, 8, 0, 0, 0, 112])
    np.testing.assert_array_equal(found.count, [2, 1, 0, 0, 0, 1, 0, 0, 0, 3])


def test_every_tenth_starts_a_bucket_in_float32():
    tenths = jnp.arange(10, dtype=jnp.float32) / 10
    found = mean_by_time(jnp.full(10, 3, jnp.float32), tenths)
    np.testing.assert_array_equal(found.value, np.full(10, 3))


def test_sums_by_time_add_up_to_the_mean_losses():
    _, _, metrics = loss_and_gradient(objective(**TWO_TERMS), parameters(2))
    for name in TWO_TERMS:
        by_time = metrics[f"loss_by_time/{name}"]
        np.testing.assert_array_equal(by_time.count, [1, 0, 0, 2, 0, 0, 0, 0, 0, 1])
        total = by_time.total.sum() / B
        assert total == pytest.approx(float(metrics[f"loss/{name}"].value), rel=1e-12)
    flow, guidance = (metrics[f"loss/{name}"].value for name in TWO_TERMS)
    assert metrics["loss"].value == pytest.approx(float(flow + 0.5 * guidance), rel=1e-12)


def test_means_over_steps_weigh_every_example_alike_and_leave_out_empty_buckets():
    totals, counts = np.zeros((2, 10), np.float32), np.zeros((2, 10), np.float32)
    totals[:, 3], counts[:, 3] = (5, 1), (1, 3)
    history = {"loss/flow": Mean(totals[:, 3], counts[:, 3])}
    history["loss_by_time/flow"] = Mean(totals, counts)
    expected = {"loss/flow": 1.5, "loss_by_time/flow/0.3": 1.5}
    assert logged(add_steps(history)) == expected


@pytest.mark.slow
def test_a_batch_in_parts_has_the_same_means():
    params = parameters(2)
    whole, halves = (
        gradients(params, Noised(*batch()), objective=objective(**TWO_TERMS), parts=parts)[1]
        for parts in (1, 2)
    )
    assert set(whole) == set(halves)
    for name in whole:
        np.testing.assert_allclose(halves[name].value, whole[name].value, rtol=1e-12)
        if name != "loss":  # which each part has one of
            np.testing.assert_array_equal(halves[name].count, whole[name].count)


@pytest.mark.parametrize("path", slow_but(["vp"], ["linear", "cosine", "vp"]))
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_predictions_of_other_kinds_are_compared_with_the_noise(path, prediction):
    process = Flow(path, "uniform", prediction=prediction)
    x0, labels, draws = batch()
    params = parameters(2)
    p = objective(process).forward(params, x0, labels, draws)
    raw = net(params, p.x_t, p.t, labels)
    # sigma times the score is minus the noise.
    scale = -process.coefficients(p.t).sigma if prediction == "score" else 1.0
    _, gradient, metrics = loss_and_gradient(objective(process, **TWO_TERMS), params)
    for name, pred in (("flow", raw.pred), ("internal_guidance", raw.heads[1])):
        expected = np.mean((scale * pred - draws.noise) ** 2)
        assert metrics[f"loss/{name}"].value == pytest.approx(float(expected), rel=1e-9)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("path", slow_but(["vp"], ["linear", "cosine", "vp"]))
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_the_loss_is_finite_at_both_ends_of_time(path, prediction):
    x0, labels, draws = batch()
    draws = replace(draws, time=jnp.array([0.0, 1.0, 0.0, 1.0]))
    process = Flow(path, "uniform", prediction=prediction)
    inputs = single((parameters(2), x0)), labels, single(draws)
    loss, metrics = objective(process, **TWO_TERMS)(*inputs[0], *inputs[1:])
    assert np.isfinite(loss) and loss.dtype == jnp.float32
    assert metrics["loss_by_time/flow"].count.sum() == B
