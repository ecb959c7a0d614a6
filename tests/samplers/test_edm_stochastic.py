"""EDM's stochastic sampler against the paper's formulas, and the distribution of what it draws.

For data N(m, s^2) the best denoiser is a line, every step is linear in the latents and the noise,
and mean and variance of the samples follow from one walk with each of them at a time.
"""

from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from vectors import quick_jit

from ig_jax import prng
from ig_jax.diffusion import process
from ig_jax.diffusion.ddpm import DDPM
from ig_jax.diffusion.flow import PATHS, Flow
from ig_jax.samplers import base
from ig_jax.samplers.edm_stochastic import EDMStochastic
from ig_jax.samplers.heun import Heun
from ig_jax.types import Field

# A mean and a spread for each channel.
MEANS = np.array([0.7, -0.4, 0.0]).reshape(1, 1, 1, 3)
SPREADS = np.array([0.3, 0.5, 2.0]).reshape(1, 1, 1, 3)
PROCESSES = {**{path: Flow(path, "uniform") for path in PATHS}, "ddpm": DDPM()}

every_path = pytest.mark.parametrize("path", PATHS)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(path: str) -> Field:
    """The exact field for N(MEANS, SPREADS^2)."""
    here = PROCESSES[path]

    def velocity(x, t):
        c = here.coefficients(t)
        mean, spread = (jnp.asarray(values, x.dtype) for values in (MEANS, SPREADS))
        z = (x - c.alpha * mean) / (c.alpha**2 * spread**2 + c.sigma**2)
        data = mean + c.alpha * spread**2 * z
        return process.velocity_from_noise_and_data(c, c.sigma * z, data)

    return Field(velocity, None, coefficients=here.coefficients, time_of_ratio=here.time_of_ratio)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# Path -> log alpha, its slope, the ratio of sigma to alpha, and its slope, as functions of time.
SCALES = {
    "linear": (
        lambda t: np.log(1 - t),
        lambda t: -1 / (1 - t),
        lambda t: t / (1 - t),
        lambda t: 1 / (1 - t) ** 2,
    ),
    "cosine": (
        lambda t: np.log(np.cos(np.pi / 2 * t)),
        lambda t: -np.pi / 2 * np.tan(np.pi / 2 * t),
        lambda t: np.tan(np.pi / 2 * t),
        lambda t: np.pi / 2 / np.cos(np.pi / 2 * t) ** 2,
    ),
    "vp": (
        lambda t: -4.975 * t**2 - 0.05 * t,
        lambda t: -9.95 * t - 0.05,
        lambda t: np.sqrt(np.exp(9.95 * t**2 + 0.1 * t) - 1),
        lambda t: (
            (9.95 * t + 0.05)
            * np.exp(9.95 * t**2 + 0.1 * t)
            / np.sqrt(np.exp(9.95 * t**2 + 0.1 * t) - 1)
        ),
    ),
}


def step_of_the_paper(path: str, x, t, t_next, z, gamma: float, s_noise: float):
    """Algorithm 2, with a scale s(t) = alpha and a noise level that is the ratio.

    dx/dt = (s' / s + level' / level) x - s level' / level D(x / s; level)
    """
    log_scale, d_log_scale, level, d_level = SCALES[path]

    def denoised(y, level):
        return (SPREADS**2 * y + level**2 * MEANS) / (SPREADS**2 + level**2)

    def slope(x, t):
        scale, rise = np.exp(log_scale(t)), d_level(t) / level(t)
        return (d_log_scale(t) + rise) * x - scale * rise * denoised(x / scale, level(t))

    now, noisier = level(t), (1 + gamma) * level(t)
    if path == "vp" and noisier > level(1.0):
        time, noisier = 1.0, level(1.0)
    else:
        time = brentq(lambda time: level(time) - noisier, 1e-3, 1 - 1e-9, xtol=1e-15, rtol=1e-15)
    x = np.exp(log_scale(time)) * (
        x / np.exp(log_scale(t)) + np.sqrt(noisier**2 - now**2) * s_noise * z
    )
    first = slope(x, time)
    second = slope(x + (t_next - time) * first, t_next)
    return x + (t_next - time) * (first + second) / 2


@every_path
@pytest.mark.parametrize(("t", "t_next"), [(0.93, 0.7), (0.5, 0.37), (0.2, 0.19)])
@pytest.mark.parametrize("s_noise", [1.0, 1.2])
def test_a_step_is_that_of_the_paper(float64, path, t, t_next, s_noise):
    x, z = 0.5 + normal(0, 4, 2, 1, 3), normal(1, 4, 2, 1, 3)
    expected = step_of_the_paper(path, x, t, t_next, z, 0.3, s_noise)
    sampler = EDMStochastic(10, s_churn=3.0, s_max=90.0, s_noise=s_noise)
    given = jnp.asarray(x), jnp.float64(t), jnp.float64(t_next), jnp.asarray(z)
    np.testing.assert_allclose(sampler.step(gaussian(path), *given), expected, rtol=1e-9)


def test_a_step_that_would_go_back_beyond_the_first_time_adds_the_noise_up_to_it(float64):
    """Of vp, where the ratio is 152 at time 1: 138 would become 180."""
    x, z = normal(0, 4, 2, 1, 3), normal(1, 4, 2, 1, 3)
    expected = step_of_the_paper("vp", x, 0.99, 0.9, z, 0.3, 1.0)
    sampler = EDMStochastic(10, s_churn=3.0, s_max=1e3, s_noise=1.0)
    given = jnp.asarray(x), jnp.float64(0.99), jnp.float64(0.9), jnp.asarray(z)
    np.testing.assert_allclose(sampler.step(gaussian("vp"), *given), expected, rtol=1e-9)


def first_time(sampler: EDMStochastic, path: str, t: float) -> float:
    """The time of the first slope of a step from t."""
    asked = []

    def velocity(x, t):
        asked.append(float(t))
        return x

    x = jnp.ones((1, 1, 1, 1))
    field = gaussian(path)._replace(velocity=velocity)
    sampler.step(field, x, jnp.float64(t), jnp.float64(t / 2), x)
    return asked[0]


@pytest.mark.parametrize("path", PROCESSES)
@pytest.mark.parametrize(("s_churn", "gamma"), [(4.0, 0.2), (9.0, sqrt(2) - 1), (1e9, sqrt(2) - 1)])
def test_the_ratio_rises_by_the_share_of_a_step_and_never_above_root_2(
    float64, path, s_churn, gamma
):
    def ratio(t: float) -> float:
        c = PROCESSES[path].coefficients(jnp.float64(t))
        return (c.sigma / c.alpha).item()

    sampler = EDMStochastic(20, s_churn=s_churn)
    found = ratio(first_time(sampler, path, 0.4)) / ratio(0.4)
    assert sampler.gamma == pytest.approx(gamma)
    assert found == pytest.approx(1 + gamma, rel=1e-9)


def walk(sampler, path: str, x, noise, grid=None):
    """The samples at the end of the sampler's grid between the first and the last time."""
    low, high = PROCESSES[path].interval(sampling=True)
    grid = low + (high - low) * sampler.grid()
    fields = [(gaussian(path), 0, len(grid) - 1)]
    return quick_jit(lambda x: base.integrate(sampler, grid, fields, x, noise)[0])(x)


def moments(sampler, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the samples, by channel, from those at the first time.

    One walk each: from 0, from 1, and from 0 with the noise 1 in one of the steps.
    """
    rows = sampler.num_steps + 2

    def noise(i):
        one = (jnp.arange(rows) == i + 2)[:, None, None, None]
        return jnp.broadcast_to(one, (rows, 1, 1, 3)).astype(jnp.float64)

    start = jnp.zeros((rows, 1, 1, 3)).at[1].set(1.0)
    end = np.asarray(walk(sampler, path, start, noise))[:, 0, 0]
    offset, slopes = end[0], end[1:] - end[0]
    mean, spread = marginal(path, PROCESSES[path].interval(sampling=True)[1])
    variance = (slopes[0] * spread) ** 2 + np.sum(slopes[1:] ** 2, axis=0)
    return offset + slopes[0] * mean, np.sqrt(variance)


def marginal(path: str, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of p_t, by channel."""
    c = PROCESSES[path].coefficients(jnp.asarray(t))
    spread = np.sqrt(c.alpha**2 * SPREADS**2 + c.sigma**2)
    return np.ravel(c.alpha * MEANS), np.ravel(spread)


def missed(sampler, path: str) -> float:
    """Largest distance of the samples' mean and standard deviation from those of p_t."""
    expected = marginal(path, PROCESSES[path].interval(sampling=True)[0])
    return np.max(np.abs(np.subtract(moments(sampler, path), expected)))


@pytest.mark.parametrize("path", PROCESSES)
def test_mean_and_variance_of_the_samples_near_those_of_the_data_by_the_order(float64, path):
    errors = [missed(EDMStochastic(n, s_churn=5.0, s_noise=1.0), path) for n in (64, 128)]
    order = np.log2(errors[0] / errors[1])
    assert order == pytest.approx(EDMStochastic.order, abs=0.05), errors
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("s_noise", [0.99, 1.01])
def test_noise_a_hundredth_off_misses_the_distribution(float64, s_noise):
    right, wrong = (
        missed(EDMStochastic(100, s_churn=5.0, s_noise=s), "linear") for s in (1.0, s_noise)
    )
    assert right < 1e-3 < 4e-3 < wrong


def of_seed(sampler, path: str, seed: int, rows: int) -> np.ndarray:
    """Samples [rows, 3] in float32; all seeds begin with the same noise."""
    start_keys, keys = (prng.sample_keys(s, jnp.arange(rows)) for s in (99, seed))
    mean, spread = (m.astype(np.float32).reshape(1, 1, 1, 3) for m in marginal(path, 1.0))
    start = mean + spread * prng.sample_normal(start_keys, (1, 1, 3), prng.LATENTS)

    def noise(i):
        return prng.sample_normal(keys, (1, 1, 3), prng.FIRST_STEP + i)

    end = walk(sampler, path, start, noise)
    assert end.dtype == jnp.float32
    return np.asarray(end)[:, 0, 0]


@pytest.mark.parametrize("path", ["cosine", "vp"])
def test_draws_have_the_mean_and_the_variance_of_the_formulas(path):
    rows, sampler = 10_000, EDMStochastic(20)
    draws = of_seed(sampler, path, 0, rows)
    with jax.enable_x64(True):
        mean, spread = moments(sampler, path)
    error = spread / np.sqrt(rows)
    assert np.all(np.abs(draws.mean(axis=0) - mean) < 5 * error)
    assert np.all(np.abs(draws.std(axis=0) - spread) < 5 * error / np.sqrt(2))


def test_a_seed_draws_the_same_again_and_another_one_something_else():
    first, again, other = (of_seed(EDMStochastic(5), "linear", seed, 4) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)


@pytest.mark.parametrize("path", PROCESSES)
@pytest.mark.parametrize(
    ("settings", "apart"), [({"s_churn": 0.0}, 0), ({"s_min": 1e6, "s_max": 1e7}, 1e-6)]
)
def test_without_added_noise_it_is_heun(path, settings, apart):
    x, noise = (
        jnp.asarray(normal(0, 4, 1, 1, 3), jnp.float32),
        lambda i: jnp.full((4, 1, 1, 3), 9.0),
    )
    found = walk(EDMStochastic(7, **settings), path, x, noise)
    np.testing.assert_allclose(found, walk(Heun(7), path, x, noise), rtol=apart, atol=apart)


def added(sampler, path: str, t, dtype=jnp.float64) -> bool:
    """Whether a step from t differs from one of Heun's; fails where it is not finite."""
    x = jnp.asarray(normal(0, 4, 1, 1, 3), dtype)
    given = gaussian(path), x, dtype(t), dtype(t / 2)
    found = sampler.step(*given, jnp.asarray(normal(1, 4, 1, 1, 3), dtype))
    assert found.dtype == dtype and np.all(np.isfinite(found))
    return not np.array_equal(found, Heun(10).step(*given))


@every_path
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_nothing_is_added_at_time_1(float64, path, dtype):
    sampler = EDMStochastic(10, s_min=0.0, s_max=float("inf"))
    assert not added(sampler, path, 1.0, dtype)
    assert added(sampler, path, 0.9, dtype)


def test_nothing_is_added_where_a_grid_begins_before_the_first_time_of_sampling(float64):
    """A network of the noise is asked from 0.999 on."""
    field = gaussian("linear")._replace(
        time_of_ratio=Flow("linear", "uniform", prediction="noise").time_of_ratio
    )
    sampler, x = EDMStochastic(10, s_max=1e9), jnp.asarray(normal(0, 4, 1, 1, 3))
    for t, same in ((0.9995, True), (0.998, False)):
        given = field, x, jnp.float64(t), jnp.float64(0.9)
        found = sampler.step(*given, jnp.asarray(normal(1, 4, 1, 1, 3)))
        assert np.array_equal(found, Heun(10).step(*given)) == same


@pytest.mark.parametrize("path", ["vp", "ddpm"])
def test_noise_less_than_rounding_is_no_noise(path):
    """The difference of two variances may not be below 0."""
    x, noise = (jnp.asarray(normal(i, 1, 1, 1, 3), jnp.float32) for i in (0, 1))
    times = jnp.linspace(0.05, 0.95, 200)

    def steps(sampler):
        step = jax.vmap(lambda t: sampler.step(gaussian(path), x, t, t / 2, noise))
        return quick_jit(step)(times)

    found = steps(EDMStochastic(10, s_churn=1e-7))
    np.testing.assert_allclose(found, steps(Heun(10)), atol=0.02)


@every_path
def test_noise_is_added_from_the_least_to_the_most_ratio(float64, path):
    def time(ratio: float) -> float:
        return PROCESSES[path].time_of_ratio(jnp.float64(ratio)).item()

    sampler = EDMStochastic(10, s_min=0.5, s_max=4.0)
    found = [added(sampler, path, time(ratio)) for ratio in (0.499, 0.501, 3.99, 4.01)]
    assert found == [False, True, True, False]


@every_path
def test_the_last_step_is_eulers(float64, path):
    x, times = jnp.asarray(normal(0, 4, 1, 1, 3)), (jnp.float64(0.3), jnp.float64(0.1))
    expected = x - 0.2 * gaussian(path).velocity(x, times[0])
    found = EDMStochastic(10).last_step(gaussian(path), x, *times)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("s_churn", [0.0, 1e-3])
def test_it_is_stochastic_where_it_adds_noise(s_churn):
    assert EDMStochastic(10, s_churn=s_churn).stochastic == (s_churn > 0)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"s_churn": -1.0}, "s_churn = -1.0: must not be negative; 0 adds no noise"),
        ({"s_churn": float("nan")}, "s_churn = nan: must not be negative; 0 adds no noise"),
        ({"s_min": -0.1}, "s_min = -0.1, s_max = 50.0: must satisfy 0 <= s_min <= s_max"),
        ({"s_max": 0.01}, "s_min = 0.05, s_max = 0.01: must satisfy 0 <= s_min <= s_max"),
        ({"s_noise": 0.0}, "s_noise = 0.0: must be above 0; 1 is the exact variance"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(settings, rule):
    with pytest.raises(ValueError) as refused:
        EDMStochastic(10, **settings)
    assert str(refused.value) == rule
