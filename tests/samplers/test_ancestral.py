"""Ancestral sampling and DDIM against Gaussian data, where every step is affine and known.

For data N(m, s^2), x at a step is N(alpha m, a s^2 + 1 - a), and the best prediction of the noise
sigma (x - alpha m) / (a s^2 + 1 - a). Every step then maps x to slope x + offset + deviation z, and

  mean <- slope mean + offset,      variance <- slope^2 variance + deviation^2

holds without any error of sampling. A sampler's own moments are read off its runs from x = 0, from
x = 1, and from x = 0 with a noise of 1 in one step: nothing is drawn.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but
from vectors import quick_jit

from ig_jax.diffusion.ddpm_steps import Steps, kept_steps
from ig_jax.samplers import SAMPLERS, base
from ig_jax.types import Field

BETAS = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
A = np.cumprod(1 - BETAS)
LOWEST_TILDE = BETAS[1] * BETAS[0] / (1 - A[1])  # beta~ is 0 at step 0; its log is that of step 1
TILDE = BETAS * (1 - np.append(1, A[:-1])) / (1 - A)

LOWER, UPPER = np.full(1000, -1.0), np.full(1000, 1.0)  # where the variance lies, by step


def field(mean: float, std: float, variance: np.ndarray) -> Field:
    """The best prediction for N(mean, std^2), and this variance at each step."""

    def noise_and_variance(x, t):
        k = jnp.round(t * 1000).astype(int) - 1
        a = jnp.asarray(A)[k]
        noise = jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)
        return noise, jnp.full_like(x, jnp.asarray(variance)[k])

    return Field(lambda x, t: x, lambda v, x, t: x, None, noise_and_variance)


def affine(name: str, num_steps: int, field: Field, **settings):
    """(slope, offset, deviations [steps]) of the whole way, float64."""
    sampler = SAMPLERS[name](num_steps, **settings)

    def end(x):
        once = jnp.eye(len(x), k=-2)[:, :, None, None, None]  # row i + 2: a noise of 1 in step i
        fields = [(field, 0, num_steps)]
        return base.sample(sampler, sampler.grid(), fields, x, lambda i: once[:, i])

    with jax.enable_x64(True):
        start = jnp.zeros((num_steps + 2, 1, 1, 1), jnp.float64).at[1].set(1)
        found = np.ravel(quick_jit(end)(start))
    return found[1] - found[0], found[0], found[2:] - found[0]


def moments(way, mean: float, variance: float) -> tuple[float, float]:
    slope, offset, deviations = way
    return slope * mean + offset, slope**2 * variance + np.sum(deviations**2)


def slopes(mean: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Best prediction of x0 at each step: slope x + offset."""
    slope = std**2 * np.sqrt(A) / (A * std**2 + 1 - A)
    return slope, mean - slope * np.sqrt(A) * mean


def recursion(mean: float, std: float, variances: np.ndarray) -> tuple[float, float]:
    """Moments at the end, from N(0, 1), by the formulas of DDPM: step k adds variances[k]."""
    slope, offset = slopes(mean, std)
    m, v = 0.0, 1.0
    for k in range(999, -1, -1):
        a_prev = A[k - 1] if k else 1.0
        of_x0 = np.sqrt(a_prev) * BETAS[k] / (1 - A[k])
        of_x = np.sqrt(1 - BETAS[k]) * (1 - a_prev) / (1 - A[k])
        m = (of_x0 * slope[k] + of_x) * m + of_x0 * offset[k]
        v = (of_x0 * slope[k] + of_x) ** 2 * v + (variances[k] if k else 0.0)
    return m, v


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.7, 0.5),
        pytest.param(-1.0, 2.0, marks=pytest.mark.slow),
        pytest.param(0.3, 0.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("placed", "variances"), [(LOWER, TILDE), (UPPER, BETAS)])
def test_ancestral_sampling_has_the_moments_of_the_recursion(mean, std, placed, variances):
    way = affine("ancestral", 1000, field(mean, std, placed))
    np.testing.assert_allclose(moments(way, 0, 1), recursion(mean, std, variances), 1e-9, 1e-12)


def test_with_the_lower_variance_a_single_point_is_reached_exactly():
    found = moments(affine("ancestral", 1000, field(0.3, 0.0, LOWER)), 5.0, 9.0)
    np.testing.assert_allclose(found, (0.3, 0), atol=1e-12)


def test_with_the_upper_variance_a_standard_normal_stays_one_but_for_the_last_mean():
    """That mean is alpha x, at step 0."""
    found = moments(affine("ancestral", 1000, field(0.0, 1.0, UPPER)), 0.0, 1.0)
    np.testing.assert_allclose(found, (0, 1 - BETAS[0]), atol=1e-11)


def test_with_the_variance_of_the_true_reverse_step_the_data_distribution_is_reached():
    """It is beta~ + m_0^2 var(x0 | x), between the bounds; the last step is the mean alone."""
    mean, std = 0.7, 0.5
    a_prev = np.append(1, A[:-1])
    of_x0 = np.sqrt(a_prev) * BETAS / (1 - A)
    marginal = A * std**2 + 1 - A
    true = TILDE + of_x0**2 * std**2 * (1 - A) / marginal
    lower = np.log(np.append(LOWEST_TILDE, TILDE[1:]))
    placed = 2 * (np.log(true) - lower) / (np.log(BETAS) - lower) - 1
    assert np.all(np.abs(placed[1:]) <= 1)
    way = affine("ancestral", 1000, field(mean, std, placed))
    found = moments(way, np.sqrt(A[-1]) * mean, marginal[-1])
    expected = mean, A[0] * std**4 / marginal[0]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert expected[1] == pytest.approx(std**2, rel=1e-3)


@pytest.mark.parametrize(
    ("num_steps", "spacing"),
    [
        pytest.param(1000, "even", marks=pytest.mark.slow),
        (10, "even"),
        pytest.param(25, "stride", marks=pytest.mark.slow),
    ],
)
def test_ddim_without_noise_has_the_slope_of_its_formula(num_steps, spacing):
    """(alpha' alpha s^2 + sigma' sigma) / (a s^2 + 1 - a) for each step; means are carried along.

    For s = 1 this is the cosine of the angle between two steps, whose cosines and sines alpha and
    sigma are.
    """
    kept = np.array(kept_steps(num_steps, spacing))
    a, a_prev = A[kept], np.append(1, A[kept][:-1])
    alphas, sigmas = np.sqrt(a * a_prev), np.sqrt((1 - a) * (1 - a_prev))
    for mean, std in ((0.7, 0.5), (0.0, 1.0)):
        way = affine("ddim", num_steps, field(mean, std, LOWER), spacing=spacing)
        expected = np.prod((alphas * std**2 + sigmas) / (a * std**2 + 1 - a))
        assert way[0] == pytest.approx(expected, rel=1e-9)
        # From the mean of the noisiest step to the mean of the data.
        assert moments(way, np.sqrt(a[-1]) * mean, 0)[0] == pytest.approx(mean, abs=1e-9)
        assert np.all(way[2] == 0)
    angles = np.diff(np.append(0, np.arccos(np.sqrt(a))))
    assert expected == pytest.approx(np.prod(np.cos(angles)), rel=1e-9)


@pytest.mark.parametrize("num_steps", slow_but([10], [1000, 10]))
def test_ddim_at_eta_1_is_ancestral_sampling_at_the_lower_variance(num_steps):
    given = field(0.7, 0.5, LOWER)
    ours = affine("ddim", num_steps, given, eta=1.0)
    theirs = affine("ancestral", num_steps, given)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_the_noise_of_ddim_grows_with_eta():
    given = field(0.7, 0.5, LOWER)
    once = [affine("ddim", 10, given, eta=eta)[2][-2] for eta in (0.25, 0.5)]
    assert once[1] == pytest.approx(2 * once[0], rel=1e-9) and once[0] > 0


@pytest.mark.parametrize("name", slow_but(["ancestral"], ["ancestral", "ddim"]))
def test_clipping_holds_the_predicted_data_in_the_range_of_pixels(name):
    far = field(7.0, 0.0, LOWER)  # predicts x0 = 7 everywhere
    assert affine(name, 20, far)[1] == pytest.approx(7)
    assert affine(name, 20, far, clip_denoised=True)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("num_steps", "spacing"), [(1000, "even"), (250, "even"), (25, "stride"), (45, "10,15,20")]
)
def test_the_constants_of_steps_are_those_of_the_joint_gaussian(num_steps, spacing):
    """The posterior's mean at x = alpha x0 + sigma z, and its variance, make x_prev's own."""
    kept = kept_steps(num_steps, spacing)
    c, a = Steps(kept).tables, A[list(kept)]
    a_prev = np.append(1, a[:-1])
    np.testing.assert_allclose(1 / c.x0_of_x**2, a, rtol=1e-10)
    np.testing.assert_allclose(np.cumprod(1 - np.exp(c.log_beta)), a, rtol=1e-9)
    np.testing.assert_allclose(c.m_0 + c.m_x * np.sqrt(a), np.sqrt(a_prev), rtol=1e-9)
    spread = (c.m_x * np.sqrt(1 - a)) ** 2 + c.deviation**2
    np.testing.assert_allclose(spread, 1 - a_prev, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(c.noise_prev, 1 - a_prev, rtol=1e-9)
    np.testing.assert_allclose(np.exp(c.log_posterior[1:]), c.deviation[1:] ** 2, rtol=1e-9)


# Which steps are kept.


@pytest.mark.parametrize(
    ("num_steps", "spacing", "first", "last"),
    [
        (1000, "even", [0, 1, 2], 999),
        (4, "even", [0, 333, 666], 999),
        (1, "even", [0], 0),
        (5, "stride", [0, 200, 400], 800),
        (334, "stride", [0, 3, 6], 999),
        (5, "2,3", [0, 499, 500], 999),
        (3, "1,1,1", [0, 334, 667], 667),  # a thousand is 334 + 333 + 333
        (4, " 3, 1 ", [0, 250, 499], 500),
    ],
)
def test_steps_are_kept_as_worked_out_by_hand(num_steps, spacing, first, last):
    kept = kept_steps(num_steps, spacing)
    assert len(kept) == num_steps and list(kept[:3]) == first[:num_steps] and kept[-1] == last
    assert list(kept) == sorted(set(kept))


@pytest.mark.parametrize(
    ("num_steps", "spacing", "sentence"),
    [
        (0, "even", "num_steps = 0: must be at least 1"),
        (1001, "even", "num_steps = 1001: must lie in 1..1000, the steps of DDPM"),
        (300, "stride", "300: no whole stride through 1000 .* nearest number is 334, .* = even"),
        (45, "10,15", "spacing = '10,15': makes 25 steps; set num_steps to that, not to 45"),
        (601, "600,1", "spacing = '600,1': section 1 has 500 steps, of which 600 cannot be kept"),
        (10, "quadratic", "spacing = 'quadratic': must be even, stride, or steps of each section"),
        (10, "10,", "spacing = '10,': must be even"),
        (10, "11,-1", "spacing = '11,-1': must be even"),
    ],
)
@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_steps_that_cannot_be_kept_are_refused_in_a_sentence(name, num_steps, spacing, sentence):
    with pytest.raises(ValueError, match=sentence):
        SAMPLERS[name](num_steps, spacing=spacing)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_eta_that_is_no_share_of_the_noise_is_refused(eta):
    with pytest.raises(ValueError, match=f"eta = {eta}: must lie in"):
        SAMPLERS["ddim"](10, eta=eta)


# What is asked of the field, and when.


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_the_network_is_asked_once_at_every_kept_step_and_noise_is_drawn_for_all_but_the_last(name):
    asked, drawn, x = [], [], jnp.zeros((1, 1, 1, 1))

    def noise_and_variance(x, t):
        asked.append(float(t))
        return x, x

    def noise(i):
        drawn.append(int(i))
        return x

    sampler = SAMPLERS[name](5)
    whole = Field(lambda x, t: x, lambda v, x, t: x, None, noise_and_variance)
    with jax.disable_jit():
        base.sample(sampler, sampler.grid(), [(whole, 0, 5)], x, noise)
    np.testing.assert_allclose(asked, [1, 0.75, 0.501, 0.251, 0.001], rtol=1e-6)
    assert drawn == [0, 1, 2, 3] and sampler.calls() == [1] * 5
    np.testing.assert_allclose(sampler.grid(), [*asked, 0], rtol=1e-6)


@pytest.mark.parametrize("name", slow_but(["ddim"], ["ancestral", "ddim"]))
def test_a_time_without_a_step_makes_no_number(name):
    x = jnp.zeros((1, 1, 1, 1))
    sampler = SAMPLERS[name](5)
    found = sampler.last_step(field(0.0, 1.0, LOWER), x, jnp.float32(0.6), jnp.float32(0))
    assert np.isnan(found).all()
