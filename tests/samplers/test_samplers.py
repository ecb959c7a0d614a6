"""Samplers against flows with a known answer: a Gaussian on the linear path, constant velocities.

For data N(m, s^2), p_t = N((1 - t) m, (1 - t)^2 s^2 + t^2). The probability flow keeps every point
at the same number of standard deviations, so noise x ends exactly at m + s x.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but
from vectors import quick_jit

from ig_jax import guidance
from ig_jax.diffusion.flow import Flow
from ig_jax.generation import plan
from ig_jax.guidance import Guidance
from ig_jax.samplers import SAMPLERS, base
from ig_jax.samplers.dopri5 import Dopri5
from ig_jax.samplers.euler_maruyama import EulerMaruyama
from ig_jax.types import Field

MEAN, SPREAD = 0.7, 0.5
STOCHASTIC = {"euler_maruyama", "edm_stochastic"}
# Samplers of any process; those of DDPM alone are in test_ancestral.py.
ANY = sorted(name for name, sampler in SAMPLERS.items() if sampler.process is None)
# Those on a grid of their own; the others choose their steps.
FIXED = sorted(name for name in ANY if not SAMPLERS[name].adaptive)
DETERMINISTIC = sorted(set(FIXED) - STOCHASTIC)
# Those whose steps begin at times of the grid; test_edm_stochastic.py has more on the other.
ON_THE_GRID = sorted(set(FIXED) - {"edm_stochastic"})
# Those whose steps know nothing of each other; test_multistep.py has more on the others.
MULTISTEP = {name for name in FIXED if SAMPLERS[name].multistep}
ONE_STEP = sorted(set(ANY) - MULTISTEP)

every_sampler = pytest.mark.parametrize("name", FIXED)


def standardised(x, t):
    """(x - mean of p_t) / variance of p_t, and that variance."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (x - (1 - t) * MEAN) / variance, variance


def gaussian_velocity(x, t):
    """E[eps - x_0 | x_t = x], both expectations by linear regression on x_t."""
    z, _ = standardised(x, t)
    return t * z - (MEAN + (1 - t) * SPREAD**2 * z)


FLOW = Flow("linear", "uniform")
LINEAR = {"coefficients": FLOW.coefficients, "time_of_ratio": FLOW.time_of_ratio}
GAUSSIAN = Field(gaussian_velocity, lambda v, x, t: -standardised(x, t)[0], **LINEAR)


def constant(velocity: float) -> Field:
    return Field(
        lambda x, t: jnp.full_like(x, velocity),
        lambda v, x, t: jnp.zeros_like(x),
        **LINEAR,
    )


def column(values) -> np.ndarray:
    return np.asarray(values)[:, None, None, None]


def silent(x):
    """Noise that is zero in every step."""
    return lambda i: jnp.zeros_like(x)


def run(name: str, num_steps: int, x, field: Field = GAUSSIAN, noise=None, **settings):
    """The sampler's whole grid under one field."""
    sampler = SAMPLERS[name](num_steps, **settings)
    fields = [(field, 0, len(sampler.grid()) - 1)]
    return quick_jit(lambda x: base.sample(sampler, sampler.grid(), fields, x, noise or silent(x)))(
        x
    )


START = column(np.linspace(-2, 2, 5))


def exact_flow_error(name: str, num_steps: int, **settings) -> float:
    """Largest distance from the exact end of the flow; needs 64 bits."""
    end = run(name, num_steps, jnp.asarray(START, jnp.float64), **settings)
    assert end.dtype == jnp.float64
    return np.max(np.abs(end - (MEAN + SPREAD * START)))


def exact_flow(t: float):
    """Where the flow from START is at time t."""
    return (1 - t) * MEAN + np.sqrt((1 - t) ** 2 * SPREAD**2 + t**2) * START


# In even steps of time that of DPM-Solver++ has a logarithm more: test_multistep.py.
@pytest.mark.parametrize("name", slow_but(["heun2"], sorted(set(DETERMINISTIC) - {"dpmpp_2m"})))
def test_reaches_its_declared_order_on_the_exact_gaussian_flow(name):
    with jax.enable_x64(True):
        errors = [exact_flow_error(name, n) for n in (16, 32, 64, 128)]
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    assert orders[-1] == pytest.approx(SAMPLERS[name].order, abs=0.2), errors
    assert errors[-1] < 0.02


@pytest.mark.slow
def test_heun_corrects_what_euler_predicts():
    with jax.enable_x64(True):
        assert exact_flow_error("heun", 16) < exact_flow_error("euler", 16) / 5


@pytest.mark.parametrize("time", [1 / 8, 1 / 32])
def test_heun2_corrects_the_last_step_too(time):
    def error(name: str) -> float:
        sampler = SAMPLERS[name](4)
        end = sampler.last_step(
            GAUSSIAN, jnp.asarray(exact_flow(time)), jnp.float64(time), jnp.float64(0)
        )
        return np.max(np.abs(end - exact_flow(0)))

    with jax.enable_x64(True):
        assert error("heun2") < error("heun") / 5
        assert error("heun") == error("euler")


@pytest.mark.slow
def test_heun2_ends_nearer_than_heun_on_the_same_grid():
    with jax.enable_x64(True):
        assert exact_flow_error("heun2", 16) < exact_flow_error("heun", 16) / 2


@pytest.mark.slow
def test_dopri5_ends_on_the_exact_gaussian_flow_within_its_tolerance():
    """A tolerance bounds the estimate of one step's error: the end may be off by a few of them."""
    tolerances = np.array([1e-4, 1e-7, 1e-10])
    with jax.enable_x64(True):
        errors = [exact_flow_error("dopri5", 500, rtol=t, atol=t) for t in tolerances.tolist()]
    assert np.all(errors < 5 * tolerances), errors
    assert np.all(errors > tolerances / 100), errors  # no more steps than it takes


@pytest.mark.slow
def test_dopri5_at_its_own_tolerances_is_far_nearer_than_euler_at_many_more_evaluations():
    with jax.enable_x64(True):
        assert exact_flow_error("dopri5", 50) < 3e-3 < exact_flow_error("euler", 100) / 2


@pytest.mark.slow
def test_dopri5_in_float32_ends_where_it_does_in_float64():
    end = run("dopri5", 50, jnp.asarray(START, jnp.float32))
    assert end.dtype == jnp.float32
    with jax.enable_x64(True):
        double = run("dopri5", 50, jnp.asarray(START, jnp.float64))
    np.testing.assert_allclose(end, double, atol=1e-5)


@pytest.mark.slow
def test_dopri5_that_needs_more_steps_than_it_may_take_is_not_a_number():
    x = jnp.asarray(START, jnp.float32)
    assert np.all(np.isfinite(run("dopri5", 50, x)))
    assert np.all(np.isnan(run("dopri5", 3, x)))


@pytest.mark.slow
def test_dopri5_holds_every_piece_to_the_field_of_that_piece():
    """Velocity 10 inside an interval and 1 outside: jumps that no step may smooth."""
    grid, cut = guidance.adaptive_segments(1.0, 0.0, {"ig": Guidance(2.0, low=0.2, high=0.71)})
    fields = [(constant(10.0 if s.on else 1.0), s.start, s.stop) for s in cut]
    x = jnp.zeros((1, 1, 1, 1))
    end = jax.jit(lambda x: base.sample(Dopri5(10), grid, fields, x, silent(x)))(x)
    assert end.item() == pytest.approx(-10 * 0.51 - 0.49, rel=1e-6)


@pytest.mark.parametrize("name, value", [("rtol", 0.0), ("atol", -1.0)])
def test_dopri5_refuses_a_tolerance_of_nothing(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value}: must be above 0"):
        Dopri5(10, **{name: value})


def end_of_the_sde(field: Field, loudness: float) -> tuple[float, float]:
    """Mean and spread of 20 000 samples of one pixel after 100 steps."""
    draws = np.random.default_rng(0).standard_normal((101, 20_000, 1, 1, 1), np.float32)
    start, noise = jnp.asarray(draws[0]), jnp.asarray(draws[1:])
    end = run("euler_maruyama", 100, start, field, lambda i: loudness * noise[i])
    return float(np.mean(end)), float(np.std(end))


@pytest.mark.slow
def test_euler_maruyama_with_the_exact_score_ends_in_the_data_distribution():
    mean, spread = end_of_the_sde(GAUSSIAN, loudness=1.0)
    # Five standard errors; the noiseless last step from 0.04 loses 1% of the spread.
    assert abs(mean - MEAN) < 5 * SPREAD / np.sqrt(20_000)
    assert abs(spread - SPREAD) < 0.01 + 5 * SPREAD / np.sqrt(2 * 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("score_sign, loudness", [(1, 0.0), (-1, 1.0), (0, 1.0)])
def test_without_noise_or_with_a_wrong_score_the_distribution_is_missed(score_sign, loudness):
    field = Field(gaussian_velocity, lambda v, x, t: -score_sign * standardised(x, t)[0])
    _, spread = end_of_the_sde(field, loudness)
    assert abs(spread - SPREAD) > 0.2


@every_sampler
@pytest.mark.parametrize("num_steps", [2, 7, 250])
def test_grid_falls_from_exactly_1_to_exactly_0_in_the_asked_number_of_steps(name, num_steps):
    grid = SAMPLERS[name](num_steps).grid()
    assert grid.dtype == np.float64 and grid.shape == (num_steps + 1,)
    assert grid[0] == 1 and grid[-1] == 0
    assert np.all(np.diff(grid) < 0)


@pytest.mark.parametrize("name", [*DETERMINISTIC, "edm_stochastic"])
def test_grids_other_than_that_of_the_sde_are_even(name):
    np.testing.assert_allclose(SAMPLERS[name](8).grid(), np.arange(8, -1, -1) / 8, atol=1e-15)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_times_as_far_from_both_ends_of_a_grid_add_up_to_1_to_the_bit(name):
    """As those of the published grids do; np.linspace's do not."""
    for num_steps in range(1, 300):
        grid, half = SAMPLERS[name](num_steps).grid(), num_steps // 2  # the middle has no twin
        first, last = grid[:half], grid[::-1][:half]
        np.testing.assert_array_equal(first + last, 1.0, err_msg=str(num_steps))


@pytest.mark.parametrize(
    "grid", [base.even_times(1.0, 0.04, n) for n in (2, 3, 250)], ids=["2", "3", "250"]
)
def test_even_times_keep_both_ends_and_lie_where_they_should(grid):
    assert (grid[0], grid[-1]) == (1.0, 0.04) and grid.dtype == np.float64
    np.testing.assert_allclose(grid, np.linspace(1.0, 0.04, len(grid)), rtol=1e-13)


def test_the_sde_grid_is_even_down_to_004_where_the_last_step_starts():
    expected = [1, 0.84, 0.68, 0.52, 0.36, 0.2, 0.04, 0]
    np.testing.assert_allclose(EulerMaruyama(7).grid(), expected, atol=1e-15)


GRID = np.linspace(1, 0, 9)


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, 3.0, 10.0])
def test_shifted_times_keep_their_ends_and_their_order(shift):
    found = plan.shift_times(GRID, shift)
    assert (found[0], found[-1]) == (1, 0) and np.all(np.diff(found) < 0)
    assert found.dtype == np.float64


def test_a_shift_above_1_moves_times_towards_noise_and_1_changes_nothing():
    assert np.all(plan.shift_times(GRID, 3.0)[1:-1] > GRID[1:-1])
    assert np.all(plan.shift_times(GRID, 0.3)[1:-1] < GRID[1:-1])
    np.testing.assert_array_equal(plan.shift_times(GRID, 1.0), GRID)
    assert plan.shift_times(np.array([0.5]), 3.0) == 0.75


@pytest.mark.parametrize("shift", [0.3, 3.0])
def test_the_shift_by_the_inverse_undoes_a_shift(shift):
    there = plan.shift_times(GRID, shift)
    np.testing.assert_allclose(plan.shift_times(there, 1 / shift), GRID, atol=1e-15)


def test_a_shift_is_that_of_lightningdit_by_its_inverse_in_the_other_direction_of_time():
    shift, theirs = 0.3, 1 - GRID  # 0 is noise there
    shifted = shift * theirs / (1 + (shift - 1) * theirs)
    np.testing.assert_allclose(plan.shift_times(GRID, 1 / shift), 1 - shifted, atol=1e-15)


@pytest.mark.parametrize("name", ON_THE_GRID)
def test_a_sampler_walks_the_grid_that_it_is_given(name):
    """Under a velocity of 1 the way is the length of the grid, which may stop short of 0."""
    x, grid = jnp.zeros((1, 1, 1, 1)), np.array([0.9, 0.7, 0.6, 0.2])
    end = base.sample(SAMPLERS[name](50), grid, [(constant(1.0), 0, 3)], x, silent(x))
    assert end.item() == pytest.approx(-0.7, rel=1e-6)


@pytest.mark.parametrize("name", ANY)
def test_a_grid_too_short_to_walk_is_refused(name):
    least = 2 if name == "euler_maruyama" else 1  # a noisy step and the last one
    with pytest.raises(ValueError, match=f"num_steps = {least - 1}: must be at least {least}"):
        SAMPLERS[name](least - 1)


# One step from t = 1 to 1/2 at x = 2, with v = x t, score = 3, z = -1, worked out by hand:
# euler 2 - 1/2 2; heun 2 - 1/2 (2 + 1/2) / 2; SDE 2 - 1/2 (2 - 1 * 3) + sqrt(2 * 1 * 1/2) z.
# The exact flow ends at 2 exp((1/4 - 1) / 2).
BY_HAND = {
    "euler": (1.0, 1.0),
    "heun": (1.375, 1.0),
    "heun2": (1.375, 1.375),
    "euler_maruyama": (1.5, 2.5),
    "edm_stochastic": (1.375, 1.0),  # at time 1 it adds nothing
    "dopri5": (2 * np.exp(-0.375), 2 * np.exp(-0.375)),
}


@pytest.mark.parametrize("name", slow_but(set(ONE_STEP) - {"dopri5"}, ONE_STEP))
def test_a_step_and_the_last_step_are_those_worked_out_by_hand(name):
    field = Field(lambda x, t: x * t, lambda v, x, t: jnp.full_like(x, 3.0), **LINEAR)
    x, t, t_next = jnp.full((1, 1, 1, 1), 2.0), jnp.float32(1.0), jnp.float32(0.5)
    sampler, (step, last_step) = SAMPLERS[name](10), BY_HAND[name]
    rel = 1e-3 if sampler.adaptive else 1e-6
    found = sampler.step(field, x, t, t_next, -jnp.ones_like(x)).item()
    assert found == pytest.approx(step, rel=rel)
    assert sampler.last_step(field, x, t, t_next).item() == pytest.approx(last_step, rel=rel)


def test_heun2_asks_for_the_velocity_at_the_end_of_a_step_in_every_step():
    field = Field(
        lambda x, t: jnp.full_like(x, 10.0),
        lambda v, x, t: x,
        lambda x, t: jnp.full_like(x, 2.0),
    )
    x, times = jnp.zeros((1, 1, 1, 1)), (jnp.float32(1.0), jnp.float32(0.5))
    sampler = SAMPLERS["heun2"](4)
    assert sampler.guided_at_end and not SAMPLERS["heun"].guided_at_end
    assert sampler.step(field, x, *times, x).item() == pytest.approx(-0.5 * 6)
    assert sampler.last_step(field, x, *times).item() == pytest.approx(-0.5 * 6)


@pytest.mark.parametrize("name", slow_but(["euler", *STOCHASTIC], ANY))
def test_the_noise_of_a_step_matters_exactly_where_a_sampler_is_stochastic(name):
    x = jnp.ones((1, 1, 1, 1))
    quiet = run(name, 20, x)
    loud = run(name, 20, x, noise=lambda i: jnp.ones_like(x))
    assert (quiet.item() != loud.item()) == (name in STOCHASTIC)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FIXED) - MULTISTEP))
def test_cutting_the_grid_into_pieces_changes_nothing(name):
    sampler = SAMPLERS[name](6)
    draws = np.random.default_rng(0).standard_normal((7, 3, 1, 1, 2), np.float32)
    x, noise = jnp.asarray(draws[0]), lambda i: jnp.asarray(draws[1:])[i]
    cuts = [(0, 6), *((0, c, 6) for c in range(1, 6)), (0, 2, 5, 6), tuple(range(7))]

    def end(x, ends: tuple[int, ...]):
        fields = [(GAUSSIAN, *piece) for piece in zip(ends[:-1], ends[1:], strict=True)]
        return base.sample(sampler, sampler.grid(), fields, x, noise)

    whole, *pieces = quick_jit(lambda x: [end(x, ends) for ends in cuts])(x)
    for ends, piece in zip(cuts[1:], pieces, strict=True):
        np.testing.assert_allclose(piece, whole, rtol=1e-6, atol=1e-6, err_msg=str(ends))


@pytest.mark.parametrize("name", slow_but(["dpmpp_2m", "euler_maruyama", "heun2"], ON_THE_GRID))
@pytest.mark.parametrize("cut", slow_but([2], range(1, 6)))
def test_every_piece_moves_under_its_own_field(name, cut):
    """Velocity a before the cut and b after it: the distance is their average over the grid."""
    sampler, x = SAMPLERS[name](6), jnp.zeros((1, 1, 1, 1))
    fields = [(constant(10.0), 0, cut), (constant(1.0), cut, 6)]
    at_cut = sampler.grid()[cut]
    expected = -10.0 * (1 - at_cut) - 1.0 * at_cut
    end = base.sample(sampler, sampler.grid(), fields, x, silent(x))
    assert end.item() == pytest.approx(expected, rel=1e-6)


def record(name: str, num_steps: int) -> tuple[list[float], list[int]]:
    """Times at which the field is evaluated, and step indices for which noise is drawn."""
    times, indices, x = [], [], jnp.zeros((1, 1, 1, 1))

    def velocity(x, t):
        times.append(float(t))
        return x

    def noise(i):
        indices.append(int(i))
        return x

    field = Field(velocity, lambda v, x, t: x, **LINEAR)
    sampler = SAMPLERS[name](num_steps)
    with jax.disable_jit():
        base.sample(sampler, sampler.grid(), [(field, 0, num_steps)], x, noise)
    return times, indices


# Evaluations of the field in five steps.
CALLS = {
    "euler": [1, 1, 1, 1, 1],
    "heun": [2, 2, 2, 2, 1],
    "heun2": [2, 2, 2, 2, 2],
    "euler_maruyama": [1, 1, 1, 1, 1],
    "edm_stochastic": [2, 2, 2, 2, 1],
    "dpmpp_2m": [1, 1, 1, 1, 1],
    "adams_bashforth": [1, 1, 1, 1, 1],
}


@every_sampler
def test_every_step_evaluates_as_often_as_declared(name):
    times, _ = record(name, 5)
    sampler = SAMPLERS[name](5)
    assert sampler.calls() == CALLS[name] and len(times) == sum(CALLS[name])
    starts = np.cumsum([0, *CALLS[name][:-1]])
    found, expected = np.array(times)[starts], sampler.grid()[:-1]
    if name in ON_THE_GRID:
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    else:  # all but the first and the last begin at a noisier time
        np.testing.assert_array_equal(found > expected + 0.01, [False, True, True, True, False])
    ends = np.delete(times, starts)  # of correctors: where their steps end
    np.testing.assert_allclose(ends, sampler.grid()[1 : 1 + len(ends)], atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(FIXED) - {"heun2"}))
def test_nothing_is_evaluated_at_time_0_where_the_last_step_is_eulers(name):
    times, _ = record(name, 5)
    assert min(times) == times[-1] > 0  # no corrector, no score


@pytest.mark.parametrize("name", sorted(set(FIXED) - MULTISTEP))
def test_noise_is_asked_for_once_a_step_and_never_for_the_last(name):
    assert record(name, 5)[1] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", slow_but(["dpmpp_2m", "euler"], sorted(set(ANY) - STOCHASTIC)))
def test_a_straight_flow_is_walked_exactly_in_one_step(name):
    x = jnp.full((1, 1, 1, 1), 3.0)
    steps = 10 if SAMPLERS[name].adaptive else 1
    assert run(name, steps, x, constant(2.0)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", slow_but(["euler_maruyama"], FIXED))
def test_250_steps_in_float32_stay_within_their_rounding_of_float64(name):
    draws = np.random.default_rng(0).standard_normal((251, 64, 1, 1, 1), np.float32)

    def end(dtype):
        x, noise = jnp.asarray(draws[0], dtype), jnp.asarray(draws[1:], dtype)
        return run(name, 250, x, noise=lambda i: noise[i])

    with jax.enable_x64(True):
        single, double = end(jnp.float32), end(jnp.float64)
        assert single.dtype == jnp.float32
        error = np.max(np.abs(double - single.astype(jnp.float64)))
    # Errors of half an epsilon of |x| < 4 a step add up like a random walk; two spreads of it.
    assert 0 < error < 2 * np.sqrt(250) * 4 * np.finfo(np.float32).eps / 2
