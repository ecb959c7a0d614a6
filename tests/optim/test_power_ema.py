"""Power-function averages against their definition: weights s^g of the update s."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but

from ig_jax.optim import ema, power_ema
from ig_jax.optim.power_ema import Profile


def walk(steps: int) -> np.ndarray:
    """Parameters [steps, 3] after each update, none near zero."""
    return 3 + np.cumsum(np.random.default_rng(3).normal(size=(steps, 3)), axis=0) / 30


def averaged(values: np.ndarray, sigma_rel: float, step: int) -> np.ndarray:
    """By the definition: weights that are integrals of s^g over the update s."""
    g, s = power_ema.exponent(sigma_rel), np.arange(1, step + 1)
    weights = ((s / step) ** (g + 1)) - (((s - 1) / step) ** (g + 1))
    np.testing.assert_allclose(weights.sum(), 1)
    return weights @ values[:step]


@pytest.mark.parametrize(("sigma_rel", "published"), [(0.05, 16.97), (0.1, 6.94)])
def test_exponents_are_those_of_the_paper(sigma_rel, published):
    assert power_ema.exponent(sigma_rel) == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.005, 0.03, 0.25])
def test_a_length_is_the_relative_deviation_of_its_weighting(sigma_rel):
    g, t = power_ema.exponent(sigma_rel), (np.arange(10**6) + 0.5) / 10**6
    weights = t**g / np.sum(t**g)
    mean = weights @ t
    assert np.sqrt(weights @ (t - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-4)


def test_averages_while_training_are_the_weighted_sums():
    values = walk(40)
    names = ["sigma_rel_0.05", "sigma_rel_0.17"]
    averages = ema.init({"w": jnp.full(3, 100.0)}, names)  # forgotten at once
    move = jax.jit(ema.update)
    for step, now in enumerate(values):
        averages = move(averages, {"w": jnp.asarray(now, jnp.float32)}, step)
    for name in names:
        expected = averaged(values, ema.length(name), 40)
        np.testing.assert_allclose(averages[name]["w"], expected, rtol=3e-6)


def test_a_step_of_a_long_run_keeps_its_digits():
    share = jax.jit(power_ema.share_of_new, static_argnums=0)(0.05, jnp.int32(1_234_566))
    g = power_ema.exponent(0.05)
    assert float(share) == pytest.approx(-np.expm1((g + 1) * np.log1p(-1 / 1_234_567)), rel=1e-5)


def test_warm_up_is_of_the_decays_alone():
    params, other = {"w": jnp.ones(2)}, {"w": jnp.full(2, 3.0)}
    names = ("0.9", "sigma_rel_0.1")
    found = [ema.update(ema.init(params, names), other, 5, power) for power in (0.0, 0.67)]
    assert found[0]["sigma_rel_0.1"]["w"][0] == found[1]["sigma_rel_0.1"]["w"][0]
    assert found[0]["0.9"]["w"][0] != found[1]["0.9"]["w"][0]


@pytest.mark.parametrize("pair", [((0.05, 700), (0.13, 1000)), ((0.2, 1000), (0.07, 900))])
def test_inner_products_are_the_integrals(pair):
    t = (np.arange(10**6) + 0.5) / 10**3  # to 1000

    def weighting(p):
        g = power_ema.exponent(p.sigma_rel)
        return np.where(t <= p.step, (g + 1) / p.step * (t / p.step) ** g, 0)

    a, b = (Profile(*p) for p in pair)
    integral = np.mean(weighting(a) * weighting(b)) * 1000
    assert power_ema.inner_product(a, b) == pytest.approx(integral, rel=1e-5)
    assert power_ema.inner_product(b, a) == power_ema.inner_product(a, b)


@pytest.mark.parametrize(
    "wanted",
    slow_but([(0.08, 1750)], [(0.03, 2000), (0.07, 2000), (0.15, 2000), (0.08, 1750)]),
)
def test_an_average_of_another_length_and_step_is_composed(wanted):
    values = walk(2000)
    stored = [Profile(s, t) for t in range(50, 2001, 50) for s in (0.05, 0.1)]
    coefficients, error = power_ema.compose(stored, Profile(*wanted))
    assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    averages = np.stack([averaged(values, *p) for p in stored])
    expected = averaged(values, *wanted)
    nearest = np.abs(averages - expected).max(axis=1).min()
    assert np.abs(coefficients @ averages - expected).max() < nearest / 20
    assert 0 < error < 0.02


def test_a_stored_average_is_composed_of_itself():
    stored = [Profile(s, t) for t in (300, 800) for s in (0.05, 0.1)]
    coefficients, error = power_ema.compose(stored, stored[1])
    np.testing.assert_allclose(coefficients, [0, 1, 0, 0], atol=1e-6)
    assert error < 1e-5


@pytest.mark.slow
def test_few_averages_compose_worse_and_say_so():
    errors = []
    for every in (50, 200, 1000):
        stored = [Profile(s, t) for t in range(every, 2001, every) for s in (0.05, 0.1)]
        errors.append(power_ema.compose(stored, Profile(0.2, 2000)).error)
    assert errors[0] < 0.01 < errors[1] < errors[2] and errors[2] > 0.1


@pytest.mark.parametrize("text", ["0.9", "raw", "sigma_rel_", "sigma_rel_x", "sigma_rel_0.3"])
def test_what_names_no_length(text):
    assert ema.length(text) is None


def test_names_of_lengths_are_short_and_read_back():
    assert ema.name_of_length(0.05) == "sigma_rel_0.05" == ema.name("sigma_rel_0.05")
    assert ema.length(ema.name_of_length(0.125)) == 0.125
    train = {"ema_decays": (0.9,), "ema_sigma_rel": (0.05, 0.1)}
    assert ema.in_config(train) == ["0.9", "sigma_rel_0.05", "sigma_rel_0.1"]
    assert ema.in_config({"ema_decays": [0.9]}) == ["0.9"]  # an older run
