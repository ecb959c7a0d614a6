"""The flow process against what defines it: x_t = alpha x_0 + sigma eps, v = dx_t/dt.

The paths are written out here a second time, in float64, straight from the paper; time derivatives
come from automatic differentiation, scores from the density of a Gaussian.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.diffusion import process
from ig_jax.diffusion.flow import PATHS, Flow

# Path -> (alpha, sigma) as functions of time (SiT, arXiv 2401.08740, section 2).
SCHEDULES = {
    "linear": (lambda t: 1 - t, lambda t: t),
    "cosine": (lambda t: np.cos(np.pi / 2 * t), lambda t: np.sin(np.pi / 2 * t)),
}
TIMES = np.array([0.02, 0.1, 0.25, 0.5, 0.7, 0.9, 0.98])
SHAPE = (len(TIMES), 2, 2, 3)
# Dividing by alpha or sigma >= 0.02 turns a float32 rounding of 6e-8 into 3e-6 and a few of them.
ATOL = 3e-5

every_path = pytest.mark.parametrize("path", PATHS)


def flow(path: str, times: str = "uniform") -> Flow:
    return Flow(path=path, time_distribution=times)


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def column(values: np.ndarray) -> np.ndarray:
    """[b] -> [b, 1, 1, 1]."""
    return np.asarray(values)[:, None, None, None]


def sigmas(path: str) -> np.ndarray:
    """What scores are multiplied by before they are compared: errors grow like 1 / sigma."""
    return column(SCHEDULES[path][1](TIMES)).astype(np.float32)


def close(actual, expected, atol: float = ATOL) -> None:
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=1e-5, atol=atol)


@pytest.fixture(scope="module")
def x0():
    return jnp.asarray(normal(0))


@pytest.fixture(scope="module")
def noise():
    return jnp.asarray(normal(1))


@pytest.fixture(scope="module")
def t():
    return jnp.asarray(TIMES, jnp.float32)


def test_every_path_has_a_schedule_here():
    assert set(PATHS) == set(SCHEDULES)


@every_path
def test_noising_mixes_data_and_noise_by_the_papers_schedule(path, x0, noise, t):
    alpha, sigma = SCHEDULES[path]
    expected = column(alpha(TIMES)) * normal(0) + column(sigma(TIMES)) * normal(1)
    close(flow(path).perturb(x0, noise, t), expected, atol=1e-6)


@every_path
def test_time_0_is_data_and_time_1_is_noise(path, x0, noise):
    start, end = jnp.zeros(SHAPE[0]), jnp.ones(SHAPE[0])
    close(flow(path).perturb(x0, noise, start), x0, atol=1e-6)
    close(flow(path).perturb(x0, noise, end), noise, atol=1e-6)


@every_path
def test_target_is_the_time_derivative_of_noising(path, x0, noise, t):
    _, derivative = jax.jvp(lambda t: flow(path).perturb(x0, noise, t), (t,), (jnp.ones_like(t),))
    close(flow(path).target(x0, noise, t), derivative, atol=1e-6)


@every_path
def test_the_network_predicts_the_target_and_is_told_the_time_as_it_is(path, x0, noise, t):
    target = flow(path).target(x0, noise, t)
    np.testing.assert_array_equal(flow(path).velocity(target, x0, t), target)
    np.testing.assert_array_equal(flow(path).condition_time(t), t)


@every_path
def test_velocity_tells_the_data_the_noise_and_the_score(path, x0, noise, t):
    x_t, v = flow(path).perturb(x0, noise, t), flow(path).target(x0, noise, t)
    c = flow(path).coefficients(t)
    close(process.data_from_velocity(c, v, x_t), x0)
    close(process.noise_from_velocity(c, v, x_t), noise)
    close(sigmas(path) * flow(path).score(v, x_t, t), -noise)


@every_path
def test_the_data_the_noise_and_the_score_each_tell_the_velocity(path, x0, noise, t):
    x_t, v = flow(path).perturb(x0, noise, t), flow(path).target(x0, noise, t)
    c = flow(path).coefficients(t)
    score = -noise / sigmas(path)
    close(process.velocity_from_data(c, x0, x_t), v)
    close(process.velocity_from_noise(c, noise, x_t), v)
    close(process.velocity_from_score(c, score, x_t), v)
    close(process.velocity_from_noise_and_data(c, noise, x0), v)


@every_path
def test_score_of_a_gaussian_is_the_gradient_of_its_log_density(path, t):
    """Data N(m, s^2) gives p_t = N(alpha m, alpha^2 s^2 + sigma^2), and v = E[dx_t/dt | x_t]."""
    m, s = 0.7, 0.5
    x = jnp.asarray(normal(2))
    alpha, sigma = (column(f(TIMES)) for f in SCHEDULES[path])
    variance = alpha**2 * s**2 + sigma**2
    standardised = (x - alpha * m) / variance
    data, noise = m + alpha * s**2 * standardised, sigma * standardised
    velocity = flow(path).target(data.astype(jnp.float32), noise.astype(jnp.float32), t)

    def log_density(x):
        return jnp.sum(-((x - alpha * m) ** 2) / (2 * variance))

    score = flow(path).score(velocity, x, t)
    close(sigmas(path) * score, sigmas(path) * jax.grad(log_density)(x))


@every_path
@pytest.mark.parametrize("scale", [0.0, 1.4, 4.0])
def test_guiding_then_score_equals_score_then_guiding(path, scale, t):
    weak, strong, x = (jnp.asarray(normal(seed)) for seed in (3, 4, 5))
    score = flow(path).score
    guided = weak + scale * (strong - weak)
    separately = score(weak, x, t) + scale * (score(strong, x, t) - score(weak, x, t))
    close(sigmas(path) * score(guided, x, t), sigmas(path) * separately)


@every_path
def test_every_example_has_its_own_time(path, x0, noise, t):
    together = flow(path).perturb(x0, noise, t)
    alone = [flow(path).perturb(x0[i : i + 1], noise[i : i + 1], t[i : i + 1]) for i in (0, 3, 6)]
    close(together[jnp.array([0, 3, 6])], jnp.concatenate(alone), atol=1e-6)


@every_path
def test_one_time_for_all_is_the_same_as_that_time_for_each(path, x0, noise):
    score = flow(path).score
    np.testing.assert_allclose(
        score(x0, noise, jnp.float32(0.3)), score(x0, noise, jnp.full(SHAPE[0], 0.3)), rtol=1e-6
    )


@every_path
def test_a_lognormal_draw_is_the_log_of_sigma_over_alpha(path):
    alpha, sigma = SCHEDULES[path]
    draws = np.linspace(-4, 4, 41)
    times = np.asarray(flow(path, "lognormal").time(jnp.asarray(draws, jnp.float32)), np.float64)
    np.testing.assert_allclose(np.log(sigma(times) / alpha(times)), draws, atol=2e-5)


@every_path
def test_lognormal_times_have_standard_normal_log_ratios(path):
    process_, n = flow(path, "lognormal"), 50_000
    alpha, sigma = SCHEDULES[path]
    times = np.asarray(process_.time(process_.draw_time(jax.random.key(0), n)), np.float64)
    assert 0 <= times.min() and times.max() <= 1
    z = np.log(sigma(times) / alpha(times))
    # Five standard errors of the first four moments of N(0, 1).
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(np.mean(z**power) - moment) < 5 * np.sqrt(variance / n), power


@every_path
def test_uniform_times_fill_the_unit_interval_evenly(path):
    process_, n = flow(path, "uniform"), 50_000
    times = np.sort(process_.time(process_.draw_time(jax.random.key(0), n)))
    assert 0 <= times[0] and times[-1] <= 1
    # Kolmogorov-Smirnov: exceeded once in 3000 seeds.
    assert np.max(np.abs(times - np.arange(n) / n)) < 2.1 / np.sqrt(n)


@pytest.mark.parametrize("times", ["uniform", "lognormal"])
def test_draws_depend_on_the_key(times):
    draw = flow("linear", times).draw_time
    assert np.all(draw(jax.random.key(0), 8) == draw(jax.random.key(0), 8))
    assert np.all(draw(jax.random.key(0), 8) != draw(jax.random.key(1), 8))


def test_an_unknown_path_is_refused_by_name():
    with pytest.raises(ValueError, match="path = 'straight'.*linear, cosine"):
        flow("straight")


def test_an_unknown_time_distribution_is_refused_by_name():
    with pytest.raises(ValueError, match="time_distribution = 'normal'.*uniform, lognormal"):
        flow("linear", "normal")
