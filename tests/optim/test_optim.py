"""The update of the parameters against its formulas, written out again in float64 numpy.

AdamW (arXiv 1711.05101): m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, and with both corrected
for their zero start, p <- p - lr (m / (sqrt(v) + eps) + weight_decay p). g is clipped first.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adamw import SETTINGS
from tiers import slow_but

from ig_jax import optim
from ig_jax.diffusion.flow import Flow
from ig_jax.objectives import FlowMatching, InternalGuidance
from ig_jax.objectives.base import Objective
from ig_jax.optim import SCHEDULES, AdamWSettings, ema
from ig_jax.training.step import Noised, gradients
from ig_jax.types import NetOutput


def settings(**changes) -> AdamWSettings:
    return dataclasses.replace(SETTINGS, **changes)


def rates(updates: int, total: int, **changes) -> list[float]:
    schedule = optim.learning_rate(settings(**changes), total)
    return [float(schedule(i)) for i in range(updates)]


def test_a_constant_rate_stays_at_its_peak():
    assert rates(20, 10, schedule="constant") == pytest.approx([0.1] * 20)


def test_a_cosine_rate_falls_from_the_peak_to_zero_by_half_a_period():
    expected = [0.05 * (1 + np.cos(np.pi * i / 10)) for i in range(11)]
    assert rates(11, 10, schedule="cosine") == pytest.approx(expected, abs=1e-8)


def test_a_linear_rate_falls_from_the_peak_to_zero_in_equal_steps():
    expected = [0.1 * (1 - i / 10) for i in range(11)]
    assert rates(11, 10, schedule="linear") == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_moves_at_once_and_climbs_evenly_to_the_peak(schedule):
    climb = rates(5, 25, schedule=schedule, warmup_steps=5)
    assert climb == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates(1, 25, schedule=schedule, warmup_steps=1) == pytest.approx([0.1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_warm_up_the_schedule_has_the_steps_that_are_left(schedule):
    whole = rates(26, 25, schedule=schedule, warmup_steps=5)
    assert whole[5:] == pytest.approx(rates(21, 20, schedule=schedule), abs=1e-8)
    assert max(whole) == pytest.approx(0.1)
    assert whole[25] == pytest.approx(0.1 if schedule == "constant" else 0, abs=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_shorter_than_its_warm_up_just_climbs(schedule):
    climb = rates(3, 3, schedule=schedule, warmup_steps=10)
    assert climb == pytest.approx([0.01, 0.02, 0.03])


START = {"pos_embed": jnp.array([5.0, 6.0]), "layer": {"w": jnp.array([1.0, -2.0, 3.0])}}


def gradients_of_steps(sizes: list[float]) -> list[dict]:
    """Gradients of the given norms over the trained leaves; the fixed one's is enormous."""
    draws = np.random.default_rng(0).standard_normal((len(sizes), 3))
    draws *= np.array(sizes)[:, None] / np.linalg.norm(draws, axis=1, keepdims=True)
    fixed = jnp.array([1e6, -1e6])
    return [{"pos_embed": fixed, "layer": {"w": jnp.asarray(g, jnp.float32)}} for g in draws]


def trajectory(s: AdamWSettings, grads: list[dict], total: int = 8) -> list[dict]:
    optimizer = optim.adamw(s, total)
    params, state, after = START, optimizer.init(START), []
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after


def by_formula(s: AdamWSettings, grads: list[dict], rates: list[float]) -> list[np.ndarray]:
    p = np.asarray(START["layer"]["w"], np.float64)
    m, v, after = np.zeros(3), np.zeros(3), []
    for step, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        g = np.asarray(grad["layer"]["w"], np.float64)
        g = g * min(1.0, s.clip_norm / np.linalg.norm(g)) if s.clip_norm else g
        m, v = s.b1 * m + (1 - s.b1) * g, s.b2 * v + (1 - s.b2) * g**2
        direction = m / (1 - s.b1**step) / (np.sqrt(v / (1 - s.b2**step)) + s.eps)
        p = p - rate * (direction + s.weight_decay * p)
        after.append(p)
    return after


@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_norm": 0.0}, {"weight_decay": 0.0}, {"schedule": "linear", "warmup_steps": 2}],
    ids=str,
)
def test_parameters_follow_the_formula_of_adamw_with_clipping(changes):
    """Norms below, at and above the clip; Adam's memory makes the clip visible."""
    s, grads = settings(**changes), gradients_of_steps([0.2, 50.0, 1.0, 0.5, 7.0])
    expected = by_formula(s, grads, rates(5, 8, **changes))
    for params, w in zip(trajectory(s, grads), expected, strict=True):
        np.testing.assert_allclose(params["layer"]["w"], w, rtol=1e-5)


def test_fixed_leaves_never_change_whatever_their_gradient_and_the_weight_decay():
    for params in trajectory(SETTINGS, gradients_of_steps([0.2, 50.0])):
        np.testing.assert_array_equal(params["pos_embed"], START["pos_embed"])


def test_the_reported_norm_is_over_the_trained_leaves():
    grads = {"pos_embed": jnp.array([1e6]), "a": jnp.array([3.0]), "b": {"c": jnp.array([4.0])}}
    assert float(optim.gradient_norm(grads)) == pytest.approx(5.0)


@pytest.mark.parametrize(
    "path, fixed",
    [("pos_embed", True), ("net.pos_embed", True), ("pos_embed.kernel", False), ("w", False)],
)
def test_fixed_are_the_leaves_called_pos_embed(path, fixed):
    assert optim.is_fixed(path) == fixed


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 0.0),
        ("b1", 1.0),
        ("b2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("clip_norm", -1.0),
        ("warmup_steps", -1),
        ("schedule", "step"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value!r}: must "):
        settings(**{field: value})


def test_each_average_is_the_closed_form_of_its_own_decay():
    """e_n = d^n p_0 + (1 - d) sum_k d^(n - k) p_k, the table among the parameters included."""
    history = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    tables = [{"w": jnp.asarray(a), "pos_embed": jnp.asarray(b)} for a, b in history]
    averages = ema.init(tables[0], (0.0, 0.5, 0.9, 0.9999))
    for params in tables[1:]:
        averages = ema.update(averages, params)
    assert list(averages) == ["0.0", "0.5", "0.9", "0.9999"]
    for decay, average in averages.items():
        d = float(decay)
        weights = np.array([d**4, *((1 - d) * d ** (4 - k) for k in range(1, 5))])
        expected = np.tensordot(weights, history.astype(np.float64), axes=1)
        np.testing.assert_allclose(average["w"], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(average["pos_embed"], expected[1], rtol=1e-5, atol=1e-6)


def test_averages_that_warm_up_forget_the_initial_weights():
    """At step n the decay is 1 - (1 + n)^-p, up to its own."""
    history = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)
    averages = ema.init({"w": jnp.asarray(history[0])}, (0.9999, 0.7))
    move = jax.jit(ema.update, static_argnums=3)
    expected = {name: history[0].astype(np.float64) for name in averages}
    for step, w in enumerate(history[1:]):
        averages = move(averages, {"w": jnp.asarray(w)}, jnp.int32(step), 0.75)
        for name in expected:
            d = min(float(name), 1 - (1 + step) ** -0.75)
            expected[name] = d * expected[name] + (1 - d) * w
        if not step:
            np.testing.assert_array_equal(averages["0.9999"]["w"], w)
    for name, average in averages.items():
        np.testing.assert_allclose(average["w"], expected[name], rtol=1e-5, atol=1e-6)
    assert np.abs(expected["0.9999"] - expected["0.7"]).max() > 0.1
    assert ema.share_of_initial(0.9999, 5000) == pytest.approx(np.exp(-0.5), rel=1e-3)
    assert ema.share_of_initial(0.9999, 5000, 0.67) == 0


@pytest.mark.parametrize("decays", [(0.9999, 0.999), (0.5, 1e-5, 0.0), (0.0, 0.5), (1e-5, 0.5)])
def test_the_first_average_is_that_of_the_first_decay_of_the_config(decays):
    """Whatever a compiled program makes of the order, which is that of the names."""
    averages = ema.init({"w": jnp.ones(1)}, decays)
    averages = jax.jit(ema.update)(averages, {"w": jnp.zeros(1)})
    np.testing.assert_array_equal(ema.first(averages, decays)["w"], np.float32(decays[:1]))
    assert list(averages) == sorted(map(str, decays))


def test_an_average_is_called_alike_by_a_decay_written_as_a_whole_number():
    assert list(ema.init({"w": jnp.ones(1)}, (0, 0.5))) == ["0.0", "0.5"]


def test_averages_start_as_copies_that_may_be_given_away_with_the_parameters():
    params = {"w": jnp.arange(3.0)}
    averages = ema.init(params, (0.5, 0.9))
    jax.jit(lambda p: {"w": p["w"] + 1}, donate_argnums=0)(params)
    assert params["w"].is_deleted()
    assert [average["w"].tolist() for average in averages.values()] == [[0, 1, 2]] * 2


def net(params, x, t, y, *, taps=()):
    """Every parameter sees every example in a way of its own."""
    at = t[:, None, None, None]
    pred = jnp.tanh(params["w"] * x + params["labels"][y].reshape(-1, 1, 1, 1) * at)
    return NetOutput(pred=pred, heads={1: params["w"] * pred * at}, features={})


@pytest.mark.parametrize("parts", slow_but([2], [2, 4]))
def test_a_batch_in_parts_has_the_gradient_and_the_losses_of_the_whole(parts):
    objective = Objective(
        net=net,
        process=Flow(path="linear", time_distribution="uniform"),
        terms={"flow": FlowMatching(1.0), "internal_guidance": InternalGuidance(0.5)},
        label_drop=0.3,
        null_class=3,
    )
    params = {"w": jnp.float32(0.7), "labels": jnp.array([0.1, -0.2, 0.3, 0.4])}
    x0 = jax.random.normal(jax.random.key(0), (8, 2, 2, 1))
    labels = jnp.arange(8) % 3
    batch = Noised(x0, labels, objective.draw(jax.random.key(1), x0))
    whole, pieces = (
        jax.jit(functools.partial(gradients, objective=objective, parts=n))(params, batch)
        for n in (1, parts)
    )
    terms = ("flow", "internal_guidance")
    names = {f"{of}/{name}" for of in ("loss", "loss_by_time") for name in terms}
    assert set(whole[1]) == {"loss", *names}
    whole, pieces = (
        (g, {n: m.value for n, m in metrics.items()}) for g, metrics in (whole, pieces)
    )
    for expected, actual in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
