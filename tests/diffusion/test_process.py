"""Flow and DDPM against what defines them: x_t = alpha x_0 + sigma eps, v = dx_t/dt.

The paths are written out here a second time, in float64, straight from the paper; time derivatives
come from automatic differentiation, scores from the density of a Gaussian.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but
from vectors import quick_jit

from ig_jax.diffusion import process
from ig_jax.diffusion.ddpm import DDPM
from ig_jax.diffusion.flow import PATHS, PREDICTIONS, Flow
from ig_jax.guidance import Guided
from ig_jax.samplers import SAMPLERS, base
from ig_jax.types import NetOutput

# Path -> (alpha, sigma) as functions of time (SiT, arXiv 2401.08740, section 2).
SCHEDULES = {
    "linear": (lambda t: 1 - t, lambda t: t),
    "cosine": (lambda t: np.cos(np.pi / 2 * t), lambda t: np.sin(np.pi / 2 * t)),
    "vp": (
        lambda t: np.exp(-(t**2) * 19.9 / 4 - t * 0.05),
        lambda t: np.sqrt(1 - np.exp(-(t**2) * 19.9 / 2 - t * 0.1)),
    ),
}
# VP is noise at time 1 but for 0.7% of the data.
DATA_LEFT = {"linear": 0.0, "cosine": 0.0, "vp": 0.0066}
TIMES = np.array([0.02, 0.1, 0.25, 0.5, 0.7, 0.9, 0.98])
SHAPE = (len(TIMES), 2, 2, 3)
# Dividing by alpha or sigma >= 0.007 turns a float32 rounding of 6e-8 into 9e-6 and a few of them.
ATOL = 3e-5

every_path = pytest.mark.parametrize("path", PATHS)


def flow(path: str, times: str = "uniform", **settings) -> Flow:
    return Flow(path=path, time_distribution=times, **settings)


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
def test_coefficients_have_the_numerical_derivatives_of_the_schedule(path):
    with jax.enable_x64(True):
        t, h = np.linspace(0.02, 0.98, 25), 1e-5
        c = flow(path).coefficients(jnp.asarray(t))
        for value, slope, schedule in zip(
            (c.alpha, c.sigma), (c.d_alpha, c.d_sigma), SCHEDULES[path], strict=True
        ):
            np.testing.assert_allclose(value.ravel(), schedule(t), rtol=1e-12)
            numerical = (schedule(t + h) - schedule(t - h)) / (2 * h)
            np.testing.assert_allclose(slope.ravel(), numerical, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", ["cosine", "vp"])
def test_the_path_keeps_the_variance_of_unit_data(path, t):
    c = flow(path).coefficients(jnp.append(t, jnp.array([1e-5, 1e-3, 1.0])))
    np.testing.assert_allclose(c.alpha**2 + c.sigma**2, 1, rtol=1e-6)


def test_vp_is_that_of_the_published_transport_whose_time_runs_from_noise_to_data():
    """Its closed forms, beta from 0.1 to 20, at s = 1 - t; slopes turn their sign with time."""
    s = np.linspace(0.01, 0.95, 20)
    log_mean = -0.25 * (1 - s) ** 2 * (20.0 - 0.1) - 0.5 * (1 - s) * 0.1
    d_log_mean = 0.5 * (1 - s) * (20.0 - 0.1) + 0.5 * 0.1
    sigma = np.sqrt(1 - np.exp(2 * log_mean))
    d_sigma = np.exp(2 * log_mean) * (2 * d_log_mean) / (-2 * sigma)
    with jax.enable_x64(True):
        c = flow("vp").coefficients(jnp.asarray(1 - s))
        found = [np.ravel(v) for v in (c.alpha, c.sigma, c.d_alpha, c.d_sigma)]
    expected = [np.exp(log_mean), sigma, -np.exp(log_mean) * d_log_mean, -d_sigma]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@every_path
def test_the_time_of_a_ratio_is_where_sigma_over_alpha_equals_it(path):
    alpha, sigma = SCHEDULES[path]
    times = np.linspace(0.001, 0.999, 50)
    with jax.enable_x64(True):
        found = PATHS[path].time_of_ratio(jnp.asarray(sigma(times) / alpha(times)))
    np.testing.assert_allclose(found, times, rtol=1e-9)
    found = PATHS[path].time_of_ratio(jnp.array([0.0, 1e6]))
    np.testing.assert_allclose(found, [0, 1], atol=2e-6)  # VP ends at a ratio of 150


@every_path
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_time_of_a_ratio_is_at_most_that_at_which_sampling_begins(path, prediction):
    process_ = flow(path, prediction=prediction)
    found = process_.time_of_ratio(jnp.array([1.0, 1e6]))
    c, (_, first) = process_.coefficients(found), process_.interval(sampling=True)
    assert (c.sigma / c.alpha)[0].item() == pytest.approx(1.0, rel=1e-5)
    assert found[1] == pytest.approx(first, abs=2e-6)


@every_path
def test_time_0_is_data_and_time_1_is_noise(path, x0, noise):
    start, end = jnp.zeros(SHAPE[0]), jnp.ones(SHAPE[0])
    close(flow(path).perturb(x0, noise, start), x0, atol=1e-6)
    close(flow(path).perturb(x0, noise, end), noise, atol=1e-6 + DATA_LEFT[path] * 4)


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
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_of_any_kind_gives_the_velocity(path, prediction, x0, noise, t):
    process_ = flow(path, prediction=prediction)
    x_t, velocity = process_.perturb(x0, noise, t), flow(path).target(x0, noise, t)
    exact = {"velocity": velocity, "noise": noise, "score": -noise / sigmas(path)}[prediction]
    found = process_.velocity(exact, x_t, t)
    # VP divides what float32 left of x_t - sigma eps by an alpha of 0.007.
    scale = np.abs(velocity).max()
    close(found, velocity, atol=ATOL if path != "vp" else 1e-4 * scale)


@every_path
def test_what_a_comparable_prediction_should_be_has_unit_scale(path, x0, noise, t):
    """The noise itself; for the score sigma times it, because the score grows as 1 / sigma."""
    for prediction, exact, target in (
        ("noise", noise, noise),
        ("score", -noise / sigmas(path), -noise),
    ):
        process_ = flow(path, prediction=prediction)
        np.testing.assert_array_equal(process_.target(x0, noise, t), target)
        close(process_.comparable(exact, t), target, atol=1e-5)
    velocity = flow(path)
    np.testing.assert_array_equal(velocity.comparable(x0, t), x0)


@pytest.mark.parametrize(
    ("path", "prediction", "sampling", "training"),
    [
        ("linear", "velocity", (0, 1), (0, 1)),
        ("cosine", "velocity", (0, 1), (0, 1)),
        ("linear", "noise", (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ("cosine", "score", (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ("vp", "velocity", (1e-3, 1), (1e-5, 1)),
        ("vp", "noise", (1e-3, 1), (1e-5, 1)),
        ("vp", "score", (1e-3, 1), (1e-5, 1)),
    ],
)
def test_times_keep_away_from_the_ends_at_which_a_formula_divides_by_zero(
    path, prediction, sampling, training
):
    process_ = flow(path, prediction=prediction)
    assert process_.interval(sampling=True) == sampling
    assert process_.interval(sampling=False) == training
    drawn = process_.time(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(drawn, [training[0], sum(training) / 2, training[1]], rtol=1e-6)
    for t in (*sampling, *training):
        c = process_.coefficients(jnp.float32(t))
        values = [c.d_sigma, c.d_alpha]
        values += [] if prediction == "velocity" else [1 / c.alpha, 1 / c.sigma]
        assert np.all(np.isfinite(values))


MEAN, STD = 0.7, 0.5  # of data that a perfect network knows


def carry(process_, prediction, told_time, sampler, start, noise):
    """Noise `start` carried to N(MEAN, STD^2) by a network that predicts perfectly.

    The exact prediction is linear in x_t, and a deterministic sampler ends at MEAN + STD start.
    """

    def net(params, x, told, y, *, taps=()):
        c = process_.coefficients(told_time(told))
        z = (x - c.alpha * MEAN) / (c.alpha**2 * STD**2 + c.sigma**2)
        data, eps = MEAN + c.alpha * STD**2 * z, c.sigma * z
        velocity = c.d_alpha * data + c.d_sigma * eps
        exact = {"velocity": velocity, "noise": eps, "score": -z}[prediction]
        return NetOutput(pred=exact, heads={}, features={})

    low, high = process_.interval(sampling=True)
    grid = low + (high - low) * sampler.grid()
    y = jnp.zeros(len(start), jnp.int32)
    guided = Guided(net, {}, process_, y, 0, scales={}, channels={})
    fields = [(guided.field(frozenset(), frozenset()), 0, len(grid) - 1)]
    return quick_jit(lambda x: base.sample(sampler, grid, fields, x, noise))(start)


@every_path
@pytest.mark.parametrize("prediction", slow_but(["noise"], PREDICTIONS))
@pytest.mark.parametrize("name", slow_but(["dpmpp_2m"], ["heun2", "dpmpp_2m", "adams_bashforth"]))
def test_a_network_that_predicts_perfectly_carries_noise_to_the_data(path, prediction, name):
    process_ = flow(path, prediction=prediction)
    start = jnp.linspace(-2, 2, 5)[:, None, None, None]
    sampler = SAMPLERS[name](200)
    end = carry(process_, prediction, lambda told: told, sampler, start, lambda i: start)
    np.testing.assert_allclose(end, MEAN + STD * start, atol=0.01)


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


def unsqueezed(path: str, times: np.ndarray) -> np.ndarray:
    """Times before they were put into the interval of training."""
    low, high = flow(path).interval(sampling=False)
    return (np.asarray(times, np.float64) - low) / (high - low)


NORMAL = [(0.0, 1.0), (-0.4, 1.5), (1.0, 0.5)]


@every_path
@pytest.mark.parametrize(("mean", "std"), NORMAL)
def test_a_lognormal_draw_is_the_log_of_sigma_over_alpha(path, mean, std):
    alpha, sigma = SCHEDULES[path]
    draws = np.linspace(-2.5, 2.5, 41)
    process_ = flow(path, "lognormal", time_mean=mean, time_std=std)
    times = unsqueezed(path, process_.time(jnp.asarray(draws, jnp.float32)))
    # VP is steep, and its times were moved by 1e-5 in float32 and back.
    atol = 2e-3 if path == "vp" else 2e-5
    expected = mean + std * draws
    np.testing.assert_allclose(np.log(sigma(times) / alpha(times)), expected, atol=atol)


@every_path
@pytest.mark.parametrize(("mean", "std"), NORMAL)
def test_a_logit_normal_draw_is_the_logit_of_the_time_on_every_path(path, mean, std):
    draws = np.linspace(-2.5, 2.5, 41)
    process_ = flow(path, "logit_normal", time_mean=mean, time_std=std)
    times = unsqueezed(path, process_.time(jnp.asarray(draws, jnp.float32)))
    np.testing.assert_allclose(np.log(times / (1 - times)), mean + std * draws, atol=1e-4)


def assert_normal(z: np.ndarray) -> None:
    """Five standard errors of the first four moments of N(0, 1)."""
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(np.mean(z**power) - moment) < 5 * np.sqrt(variance / len(z)), power


@every_path
@pytest.mark.parametrize("times", ["lognormal", "logit_normal"])
def test_drawn_times_are_normal_with_the_asked_mean_and_deviation(path, times):
    process_ = flow(path, times, time_mean=-0.5, time_std=0.8)
    drawn = process_.time(process_.draw_time(jax.random.key(0), 50_000))
    low, high = process_.interval(sampling=False)
    assert low <= drawn.min() and drawn.max() <= high
    t = unsqueezed(path, drawn)
    alpha, sigma = SCHEDULES[path] if times == "lognormal" else SCHEDULES["linear"]
    assert_normal((np.log(sigma(t) / alpha(t)) + 0.5) / 0.8)


@every_path
def test_uniform_times_fill_the_unit_interval_evenly(path):
    process_, n = flow(path, "uniform"), 50_000
    times = np.sort(process_.time(process_.draw_time(jax.random.key(0), n)))
    assert 0 <= times[0] and times[-1] <= 1
    # Kolmogorov-Smirnov: exceeded once in 3000 seeds.
    assert np.max(np.abs(times - np.arange(n) / n)) < 2.1 / np.sqrt(n)


@pytest.mark.parametrize("times", ["uniform", "lognormal", "logit_normal"])
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


def test_an_unknown_prediction_is_refused_by_name():
    with pytest.raises(ValueError, match="prediction = 'data': .*velocity, noise, score"):
        flow("linear", prediction="data")


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_time_deviation_of_nothing_is_refused(std):
    with pytest.raises(ValueError, match=f"time_std = {std}: must be above 0"):
        flow("linear", "lognormal", time_std=std)


# DDPM: the same laws on the thousand steps that DiT is trained on.

ALPHA_BARS = np.cumprod(1 - (1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999))
STEP_TIMES = np.arange(1, 1001) / 1000


@pytest.mark.slow
def test_ddpm_meets_the_product_over_its_steps_at_every_one_of_them():
    with jax.enable_x64(True):
        exact = DDPM().coefficients(jnp.asarray(STEP_TIMES))
        np.testing.assert_allclose(exact.alpha.ravel() ** 2, ALPHA_BARS, rtol=1e-11)
        np.testing.assert_allclose(exact.sigma.ravel() ** 2, 1 - ALPHA_BARS, rtol=1e-11)
    single = DDPM().coefficients(jnp.asarray(STEP_TIMES, jnp.float32))
    np.testing.assert_allclose(single.alpha.ravel() ** 2, ALPHA_BARS, rtol=5e-6)
    np.testing.assert_allclose(single.sigma.ravel() ** 2, 1 - ALPHA_BARS, rtol=1e-6)


def test_ddpm_is_smooth_between_its_steps_with_the_numerical_derivatives_of_its_coefficients():
    with jax.enable_x64(True):
        t, h = np.linspace(0.0015, 0.9995, 999), 1e-6
        c, before, after = (DDPM().coefficients(jnp.asarray(t + d)) for d in (0, -h, h))
        for slope, low, high in (
            (c.d_alpha, before.alpha, after.alpha),
            (c.d_sigma, before.sigma, after.sigma),
        ):
            np.testing.assert_allclose(slope, (high - low) / (2 * h), rtol=1e-6)
        # Halfway between steps log alpha is the mean of its neighbours' but for the curvature.
        middles = 2 * np.log(np.ravel(c.alpha))
    chords = (np.log(ALPHA_BARS)[:-1] + np.log(ALPHA_BARS)[1:]) / 2
    np.testing.assert_allclose(middles - chords, (0.02 - 1e-4) / 999 / 8, rtol=0.05)


def test_the_time_of_a_ratio_of_ddpm_is_where_its_coefficients_have_it():
    times = np.append(np.linspace(1e-4, 0.9999, 300), 1.0)
    for x64, rtol in ((True, 1e-12), (False, 1e-5)):
        with jax.enable_x64(x64):
            c = DDPM().coefficients(jnp.asarray(times))
            found = quick_jit(DDPM().time_of_ratio)(jnp.ravel(c.sigma / c.alpha))
            assert found.dtype == c.alpha.dtype
        np.testing.assert_allclose(found, times, rtol=rtol)
    found = quick_jit(DDPM().time_of_ratio)(jnp.array([0.0, 1e3, 1e30, jnp.inf]))
    np.testing.assert_array_equal(found, [0, 1, 1, 1])


def test_ddpm_draws_every_step_equally_often_and_tells_the_network_which():
    draws = (np.arange(5000) + 0.5) / 5000
    times = DDPM().time(jnp.asarray(draws, jnp.float32))
    np.testing.assert_allclose(times, np.repeat(STEP_TIMES, 5), rtol=1e-6)
    told = DDPM().condition_time(times)
    np.testing.assert_array_equal(told, np.repeat(np.arange(1000), 5))  # no last place is off
    np.testing.assert_allclose(DDPM().time(jnp.array([0.0, 1 - 2**-24, 1.0])), [0.001, 1, 1])
    drawn = DDPM().draw_time(jax.random.key(0), 1000)
    assert 0 <= drawn.min() < 0.02 and 0.98 < drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.05


def test_ddpm_tells_fractions_between_its_steps_and_nothing_below_the_first():
    told = DDPM().condition_time(jnp.array([0.0, 0.0005, 0.001, 0.0025, 0.7, 1.0]))
    np.testing.assert_allclose(told, [0, 0, 0, 1.5, 699, 999], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampling", [True, False])
def test_ddpm_visits_its_first_to_its_last_step_where_all_is_finite(sampling):
    assert DDPM().interval(sampling=sampling) == (0.001, 1.0)
    c = DDPM().coefficients(jnp.array([0.001, 1.0]))
    values = [c.d_alpha, c.d_sigma, 1 / c.alpha, 1 / c.sigma]
    assert np.all(np.isfinite(values))


def test_ddpm_predicts_the_noise_from_which_velocity_and_score_follow(x0, noise, t):
    alpha_bar = column(ALPHA_BARS[np.round(1000 * TIMES).astype(int) - 1])
    sigma = np.sqrt(1 - alpha_bar).astype(np.float32)
    x_t = DDPM().perturb(x0, noise, t)
    close(x_t, np.sqrt(alpha_bar) * normal(0) + sigma * normal(1), atol=1e-6)
    np.testing.assert_array_equal(DDPM().target(x0, noise, t), noise)
    np.testing.assert_array_equal(DDPM().comparable(noise, t), noise)
    _, velocity = jax.jvp(lambda t: DDPM().perturb(x0, noise, t), (t,), (jnp.ones_like(t),))
    found = DDPM().velocity(noise, x_t, t)
    close(found, velocity, atol=ATOL * np.abs(velocity).max())
    close(sigma * DDPM().score(found, x_t, t), -noise, atol=3e-4)


def told_ddpm(step):
    """The time at which `DDPM` tells a network this step."""
    return (step + 1) / 1000


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [
        ("heun", 125),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *(("euler", 250), ("heun2", 125), ("dopri5", 1000)),
                *(("dpmpp_2m", 250), ("adams_bashforth", 250)),
            )
        ),
    ],
)
def test_a_perfect_ddpm_network_carries_noise_to_the_data_along_the_ode(name, num_steps):
    start = jnp.linspace(-2, 2, 5)[:, None, None, None]
    sampler = SAMPLERS[name](num_steps)
    end = carry(DDPM(), "noise", told_ddpm, sampler, start, lambda i: start)
    np.testing.assert_allclose(end, MEAN + STD * start, atol=0.01)


@pytest.mark.parametrize(("name", "num_steps"), [("euler_maruyama", 250), ("edm_stochastic", 100)])
def test_a_perfect_ddpm_network_carries_noise_to_the_data_with_noise_added(name, num_steps):
    shape = (20_000, 1, 1, 1)
    keys = jax.random.split(jax.random.key(0), 251)

    def noise(i):
        return jax.random.normal(keys[i], shape)

    sampler = SAMPLERS[name](num_steps)
    end = np.ravel(carry(DDPM(), "noise", told_ddpm, sampler, noise(250), noise))
    # Five standard errors, and what the steps leave.
    np.testing.assert_allclose(end.mean(), MEAN, atol=5 * STD / np.sqrt(20_000) + 0.005)
    np.testing.assert_allclose(end.std(), STD, atol=5 * STD / np.sqrt(40_000) + 0.005)
