"""Samplers that read the step before, against flows with a known answer on every path.

For data N(m, s^2), p_t = N(alpha m, alpha^2 s^2 + sigma^2), and the probability flow keeps every
point at the same number of standard deviations. Channels have different s: the leading error of one
of them may vanish on some grid, but not of all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but
from vectors import quick_jit

from ig_jax.diffusion import process
from ig_jax.diffusion.flow import PATHS, Flow
from ig_jax.generation import plan
from ig_jax.samplers import SAMPLERS, base
from ig_jax.types import Field

MULTISTEP = ["dpmpp_2m", "adams_bashforth"]
MEAN, SPREADS = 0.7, np.array([0.3, 0.5, 1.0, 2.0]).reshape(1, 1, 1, 4)
START = np.linspace(-2, 2, 5)[:, None, None, None] * np.ones_like(SPREADS)  # standard deviations
SHIFTS = [1 / 3, 1.0, 3.0]
# Where both ends of the log SNR are finite, and its steps fall with those of time.
INSIDE = (0.1, 0.9)
# Steps of very different lengths, longer and shorter than those before.
UNEVEN = np.array([1.0, 0.93, 0.6, 0.55, 0.3, 0.28, 0.05, 0.0])

every_path = pytest.mark.parametrize("path", slow_but(["vp"], PATHS))
every_multistep = pytest.mark.parametrize("name", MULTISTEP)
every_shift = pytest.mark.parametrize("shift", slow_but([3.0], SHIFTS))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def coefficients(path: str):
    return Flow(path, "uniform").coefficients


def gaussian(path: str, mean: float = MEAN, spreads: np.ndarray = SPREADS) -> Field:
    """The exact field for N(mean, spreads^2), a spread for each channel."""

    def velocity(x, t):
        c = coefficients(path)(t)
        z = (x - c.alpha * mean) / (c.alpha**2 * spreads**2 + c.sigma**2)
        return process.velocity_from_noise_and_data(c, c.sigma * z, mean + c.alpha * spreads**2 * z)

    return Field(velocity, None, coefficients=coefficients(path))


def marginal(path: str, t: float, mean: float = MEAN, spreads: np.ndarray = SPREADS):
    """Mean and standard deviation of p_t."""
    c = coefficients(path)(jnp.float64(t))
    return c.alpha * mean, jnp.sqrt(c.alpha**2 * spreads**2 + c.sigma**2)


def walk(name: str, grid, fields, x, *, trajectory: bool = False):
    sampler = SAMPLERS[name](len(grid) - 1)

    def draw(x, grid):  # an argument, so that grids of one length share a compiled program
        nothing = jnp.full_like(x, jnp.nan)  # no step may read noise
        return base.integrate(sampler, grid, fields, x, lambda i: nothing, trajectory=trajectory)

    end, states = quick_jit(draw)(jnp.asarray(x), jnp.asarray(grid))
    return states if trajectory else end


def error(name: str, path: str, grid: np.ndarray) -> float:
    """Largest distance from the exact flow at the end of a grid."""
    (mean, spread), (mean_end, spread_end) = (marginal(path, t) for t in (grid[0], grid[-1]))
    end = walk(name, grid, [(gaussian(path), 0, len(grid) - 1)], mean + spread * START)
    return np.max(np.abs(end - (mean_end + spread_end * START)))


def even(steps: int, shift: float, low: float, high: float) -> np.ndarray:
    return low + (high - low) * plan.shift_times(base.even_times(1.0, 0.0, steps + 1), shift)


def orders(name: str, path: str, shift: float, ends, steps) -> np.ndarray:
    errors = [error(name, path, even(n, shift, *ends)) for n in steps]
    return np.log2(np.divide(errors[:-1], errors[1:]))


@every_path
@every_shift
@pytest.mark.parametrize(("name", "order"), [*((n, 2) for n in MULTISTEP), ("euler", 1)])
def test_errors_fall_by_the_order_on_even_and_shifted_grids(name, order, path, shift):
    found = orders(name, path, shift, INSIDE, (64, 128, 256, 512))
    assert SAMPLERS[name].order == order
    np.testing.assert_allclose(found, order, atol=0.3)
    assert found[-1] == pytest.approx(order, abs=0.16)


@every_path
@every_shift
def test_adams_bashforth_keeps_its_order_from_noise_to_data(path, shift):
    ends = Flow(path, "uniform").interval(sampling=True)
    found = orders("adams_bashforth", path, shift, ends, (128, 256, 512))
    np.testing.assert_allclose(found, 2, atol=0.05)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("shift", [1 / 3, 1.0])
def test_from_noise_to_data_the_errors_of_dpm_solver_fall_by_its_order_but_for_a_logarithm(
    path, shift
):
    """Steps even in time stay large in log SNR at both ends, which adds up to log(n) / n^2."""
    (found,) = orders("dpmpp_2m", path, shift, (0.0, 1.0), (1024, 2048))
    assert found == pytest.approx(2 - np.log2(np.log(2048) / np.log(1024)), abs=0.07)


@every_path
@pytest.mark.parametrize("steps", slow_but([7], [1, 2, 7]))
def test_dpm_solver_follows_a_constant_prediction_of_the_data_exactly(path, steps):
    data, noise = 1.5, START[..., :1]
    low, high = Flow(path, "uniform").interval(sampling=True)

    def velocity(x, t):
        return process.velocity_from_data(coefficients(path)(t), jnp.full_like(x, data), x)

    grid = low + (high - low) * np.append(UNEVEN[:steps], 0.0)
    c = coefficients(path)(jnp.asarray(grid))
    on_the_way = c.alpha[:, None] * data + c.sigma[:, None] * noise[None]
    fields = [(Field(velocity, None, coefficients=coefficients(path)), 0, steps)]
    found = walk("dpmpp_2m", grid, fields, on_the_way[0], trajectory=True)
    np.testing.assert_allclose(found, on_the_way[1:], rtol=1e-12, atol=1e-13)


def test_adams_bashforth_is_exact_for_a_velocity_linear_in_time_but_for_the_first_step():
    """That one is Euler's, and off by b h^2 / 2."""
    a, b, x = 3.0, -5.0, START
    field = Field(lambda x, t: jnp.full_like(x, a + b * t), None)
    found = walk("adams_bashforth", UNEVEN, [(field, 0, 7)], x, trajectory=True)
    times = UNEVEN[1:].reshape(-1, 1, 1, 1, 1)
    exact = x - a * (1 - times) - b * (1 - times**2) / 2
    first = b * (1 - UNEVEN[1]) ** 2 / 2
    np.testing.assert_allclose(found, exact - first, rtol=1e-13)


def test_dpm_solver_takes_data_that_are_linear_in_log_snr_from_the_middle_of_each_step():
    """On steps of very different lengths, whose ratio counts; but for the first and the last."""
    grid = np.array([0.95, 0.9, 0.5, 0.45, 0.1, 0.02])
    snr = np.log((1 - grid) / grid)
    x = START

    def velocity(x, t):
        data = 0.5 + 0.3 * (jnp.log(1 - t) - jnp.log(t))
        return (x - data) / t

    field = Field(velocity, None, coefficients=coefficients("linear"))
    found = walk("dpmpp_2m", grid, [(field, 0, 5)], x, trajectory=True)
    at = [snr[0], *(snr[1:4] + snr[2:5]) / 2, snr[4]]
    for state, t, t_next, where in zip(found, grid[:-1], grid[1:], at, strict=True):
        data = 0.5 + 0.3 * where
        x = t_next / t * x + (1 - t_next - t_next / t * (1 - t)) * data
        np.testing.assert_allclose(state, x, rtol=1e-12)


# With v = x t from x = 2. Adams-Bashforth from 1 over 1/2 to 1/4: 2 - 1/2 2; then v is 1/2 after 2,
# and 1 - 1/4 (1/2 + 1/4 (1/2 - 2)). DPM-Solver++ from 4/5 over 1/2 to 1/3, to log SNR -log 4, 0,
# log 2: data are x (1 - t^2); 5/8 2 + (1/2 - 1/8) 0.72; then 2/3 1.52 + 1/3 (1.14 + 1/4 0.42).
BY_HAND = {
    "adams_bashforth": ([1, 1 / 2, 1 / 4], [1.0, 0.96875]),
    "dpmpp_2m": ([4 / 5, 1 / 2, 1 / 3], [1.52, 2 / 3 * 1.52 + 1.245 / 3]),
}


@every_multistep
def test_the_first_two_steps_are_those_worked_out_by_hand(name):
    grid, states = BY_HAND[name]
    field = Field(lambda x, t: x * t, None, coefficients=coefficients("linear"))
    x = jnp.full((1, 1, 1, 1), 2.0)
    # A third step, so that the second is not the last.
    found = walk(name, np.array([*grid, 0.1]), [(field, 0, 3)], x, trajectory=True)
    np.testing.assert_allclose(found[:2].ravel(), states, rtol=1e-12)


def first_order(path: str, x, t: float, t_next: float):
    """One step by the data predicted at its beginning: DDIM."""
    here, there = (coefficients(path)(jnp.float64(s)) for s in (t, t_next))
    data = process.data_from_velocity(here, gaussian(path).velocity(x, jnp.float64(t)), x)
    return there.alpha * data + there.sigma / here.sigma * (x - here.alpha * data)


@every_path
def test_dpm_solver_is_of_first_order_exactly_where_log_snr_has_no_end(path):
    """In the first step, which has no other before it; in the last; after pure noise."""
    low, high = Flow(path, "uniform").interval(sampling=True)
    grid = low + (high - low) * UNEVEN
    states = walk("dpmpp_2m", grid, [(gaussian(path), 0, 7)], START, trajectory=True)
    before = [jnp.asarray(START), *states[:-1]]
    off = [
        np.max(np.abs(state - first_order(path, x, t, t_next)))
        for state, x, t, t_next in zip(states, before, grid[:-1], grid[1:], strict=True)
    ]
    pure = coefficients(path)(jnp.float64(high)).alpha < 1e-9
    expected = [True, bool(pure), False, False, False, False, True]
    assert [distance < 1e-12 for distance in off] == expected, off
    assert np.all((np.array(off) < 1e-12) | (np.array(off) > 1e-4))


@every_multistep
@every_path
def test_in_float32_a_walk_from_noise_to_data_stays_within_its_rounding_of_float64(name, path):
    """The cosine of pi / 2 is -4e-8 in float32 and 6e-17 in float64, and stands for 0."""
    grid = even(20, 1.0, *Flow(path, "uniform").interval(sampling=True))
    exact = walk(name, grid, [(gaussian(path), 0, 20)], START)
    with jax.enable_x64(False):
        single = gaussian(path, spreads=SPREADS.astype(np.float32))
        found = walk(name, grid, [(single, 0, 20)], START.astype(np.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=2e-5)


@every_multistep
def test_latents_in_float64_go_with_a_network_in_float32(name):
    exact = gaussian("linear")

    def velocity(x, t):
        return exact.velocity(x, t).astype(jnp.float32)

    ends = [
        walk(name, UNEVEN, [(field, 0, 7)], START)
        for field in (exact, exact._replace(velocity=velocity))
    ]
    assert ends[1].dtype == jnp.float64
    np.testing.assert_allclose(*ends, atol=1e-6)


# Where guidance switches.


@pytest.mark.parametrize("name", slow_but(["dpmpp_2m"], MULTISTEP))
@pytest.mark.parametrize("cut", slow_but([3], range(1, 7)))
def test_after_a_switch_a_sampler_goes_on_as_if_it_began_there(name, cut):
    first, then = gaussian("linear"), gaussian("linear", mean=-2.0, spreads=SPREADS[..., ::-1])
    whole = walk(name, UNEVEN, [(first, 0, cut), (then, cut, 7)], START, trajectory=True)
    before = walk(name, UNEVEN, [(first, 0, 7)], START, trajectory=True)[:cut]
    np.testing.assert_allclose(whole[:cut], before, rtol=1e-12)
    after = walk(name, UNEVEN[cut:], [(then, 0, 7 - cut)], whole[cut - 1], trajectory=True)
    np.testing.assert_allclose(whole[cut:], after, rtol=1e-12)


@pytest.mark.parametrize("name", slow_but(["dpmpp_2m"], MULTISTEP))
@every_path
def test_a_switch_costs_no_order(name, path):
    """One Gaussian above the middle time and another below it; each flow is known."""
    other = {"mean": -2.0, "spreads": SPREADS[..., ::-1]}
    (mean, spread), (mean_mid, spread_mid) = (marginal(path, t) for t in (0.9, 0.5))
    (other_mid, other_spread), (mean_end, spread_end) = (
        marginal(path, t, **other) for t in (0.5, 0.1)
    )
    z = (mean_mid + spread_mid * START - other_mid) / other_spread

    def error(steps: int) -> float:
        fields = [(gaussian(path), 0, steps // 2), (gaussian(path, **other), steps // 2, steps)]
        end = walk(name, even(steps, 1.0, *INSIDE), fields, mean + spread * START)
        return np.max(np.abs(end - (mean_end + spread_end * z)))

    errors = [error(n) for n in (128, 256, 512)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 2, atol=0.25)
