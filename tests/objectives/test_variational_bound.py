"""The variational bound against DDPM's formulas in float64, and whom its gradient reaches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import norm

from ig_jax.config.run_config import ConfigError
from ig_jax.diffusion.ddpm import DDPM
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import NoisedBatch
from ig_jax.objectives.variational_bound import kl_of_normals, log_likelihood
from ig_jax.types import NetOutput

TERM = TERMS["variational_bound"](weight=1.0)
BETAS = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
STEPS = np.array([0, 1, 2, 40, 500, 999])
SHAPE = (len(STEPS), 4, 4, 2)


def normal(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE)


def batch(noise=None, variance=None) -> NoisedBatch:
    """Latents noised to every one of `STEPS`, and what a network might predict of them."""
    t = jnp.asarray((STEPS + 1) / 1000, jnp.float32)
    x0, true = (jnp.asarray(normal(seed), jnp.float32) for seed in (0, 1))
    pred = jnp.asarray(0.5 * normal(1) + 0.5 * normal(2) if noise is None else noise, jnp.float32)
    placed = jnp.asarray(normal(3) if variance is None else variance, jnp.float32)
    return NoisedBatch(
        x0=x0,
        noise=true,
        t=t,
        x_t=DDPM().perturb(x0, true, t),
        y=jnp.zeros(len(STEPS), jnp.int32),
        target=true,
        out=NetOutput(pred=pred, heads={}, features={}, variance=placed),
    )


def by_hand(p: NoisedBatch) -> list[float]:
    """Bits a dimension: the two densities of x_prev in float64, their divergence."""
    losses = []
    for i, k in enumerate(STEPS):
        x0, x_t, noise, v = (np.float64(a[i]) for a in (p.x0, p.x_t, p.out.pred, p.out.variance))
        a, below = np.prod(1 - BETAS[: k + 1]), np.prod(1 - BETAS[:k])

        def mean_from(x0, x_t=x_t, a=a, below=below, beta=BETAS[k]):
            of_x0 = np.sqrt(below) * beta / (1 - a)
            return of_x0 * x0 + np.sqrt(1 - beta) * (1 - below) / (1 - a) * x_t

        lowest = BETAS[1] * BETAS[0] / (1 - (1 - BETAS[0]) * (1 - BETAS[1]))
        tilde = BETAS[k] * (1 - below) / (1 - a) if k else lowest
        variance = np.exp((v + 1) / 2 * np.log(BETAS[k]) + (1 - v) / 2 * np.log(tilde))
        mean = mean_from((x_t - np.sqrt(1 - a) * noise) / np.sqrt(a))
        if k:
            square = (mean_from(x0) - mean) ** 2
            nats = np.log(variance / tilde) / 2 + (tilde + square) / (2 * variance) - 0.5
        else:
            distances = (x0 - mean) / np.sqrt(variance)
            half = 1 / 255 / np.sqrt(variance)
            inside = norm.cdf(distances + half) - norm.cdf(distances - half)
            inside = np.where(x0 < -0.999, norm.cdf(distances + half), inside)
            inside = np.where(x0 > 0.999, norm.sf(distances - half), inside)
            nats = -np.log(np.maximum(inside, 1e-12))
        losses.append(np.mean(nats) / np.log(2))
    return losses


def test_the_bound_is_the_divergence_of_two_gaussians_and_at_step_0_a_likelihood():
    p = batch()
    found, expected = TERM(p), by_hand(p)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=2e-4)
    # The published approximation of the normal distribution function is off by up to 3e-4.
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-3)


def test_the_bound_vanishes_for_the_true_noise_and_the_lower_variance_except_at_step_0():
    p = batch(noise=normal(1), variance=np.full(SHAPE, -1.0))
    found = TERM(p)
    assert np.all(np.abs(found[1:]) < 1e-4) and found[0] > 1


@pytest.mark.slow
def test_the_variance_alone_is_trained():
    def loss(noise, variance):
        p = batch()
        out = p.out.replace(pred=noise, variance=variance)
        return jnp.sum(TERM(replace(p, out=out)))

    out = batch().out
    of_noise, of_variance = jax.grad(loss, argnums=(0, 1))(out.pred, out.variance)
    assert np.all(of_noise == 0)
    assert np.all(of_variance != 0) and np.all(np.isfinite(of_variance))


def test_a_divergence_is_that_of_normals_and_not_symmetric():
    pixel = jnp.ones((1, 1, 1, 1))
    found = kl_of_normals(pixel, jnp.log(4 * pixel), 3 * pixel, jnp.log(pixel))
    assert found.item() == pytest.approx(np.log(1 / 2) + (4 + 4) / 2 - 0.5)


@pytest.mark.slow
def test_the_bins_of_an_8_bit_image_have_probability_1_in_all():
    levels = jnp.linspace(-1, 1, 256)[:, None, None, None]
    for mean, scale in ((0.3, 0.02), (-1.0, 0.5), (0.9, 2.0)):
        given = jnp.full_like(levels, mean), jnp.full_like(levels, np.log(scale))
        assert np.exp(log_likelihood(levels, *given)).sum() == pytest.approx(1, abs=1e-4)


def test_a_bin_that_is_far_off_costs_a_bounded_likelihood():
    pixel = jnp.ones((1, 1, 1, 1))
    found = log_likelihood(0 * pixel, 0.5 * pixel, -9 * pixel)
    assert found.item() == pytest.approx(np.log(1e-12))


TERMS_OF = {"objective.terms": {"flow": {"weight": 1.0}, "variational_bound": {"weight": 1.0}}}
DIT = {"model.name": "dit", "model.readouts": (), "sample.ig.scale": 1.0}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (DIT, "variational_bound: bounds a step of DDPM, but process.name = 'flow' has no such"),
        (
            {"process": {"name": "ddpm"}, "model.readouts": (), "sample.ig.scale": 1.0},
            "variational_bound: trains a variance, which model.name = 'sit' does not predict",
        ),
    ],
)
def test_a_run_without_steps_or_without_a_variance_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=f"objective.terms.{sentence}.*or remove this term"):
        tiny.experiment({**TERMS_OF, **changes})
