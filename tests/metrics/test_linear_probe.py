"""Linear probes against NumPy's steps, and against scikit-learn's logistic regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sklearn.linear_model import LogisticRegression

from ig_jax.metrics.linear_probe import EPSILON, MOMENTUM, LinearProbes, cross_entropy

GRID, WIDTH, CLASSES = (2, 3), 5, 4


def batch(n: int = 60, seed: int = 0, grid=GRID):
    """Features [t, l, n, d] of overlapping classes, with scales and centres of their own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    directions = rng.standard_normal((*grid, CLASSES, WIDTH))
    features = 0.7 * directions[..., labels, :] + rng.standard_normal((*grid, n, WIDTH))
    scales, centres = rng.uniform(0.4, 2.0, (2, *grid, 1, WIDTH))
    return jnp.asarray(features * scales + centres, jnp.float32), jnp.asarray(labels)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_adam_s_along_a_cosine(weight_decay):
    probes = LinearProbes(GRID, WIDTH, CLASSES, 7, 0.05, weight_decay)
    features, labels = batch(61)  # no class is a quarter, whose bias would stay near 0
    state, update = probes.init(), jax.jit(probes.update)
    x, one_hot = np.float64(features), np.eye(CLASSES)[labels]
    heads = [np.zeros((*GRID, WIDTH, CLASSES)), np.zeros((*GRID, 1, CLASSES))]
    first, second = ([np.zeros_like(h) for h in heads] for _ in range(2))
    for step in range(3):
        logits = x @ heads[0] + heads[1]
        log_p = np.log(softmax(logits))
        expected = -(log_p * one_hot).sum(-1).mean(-1)
        state, losses = update(state, features, labels)
        np.testing.assert_allclose(losses, expected, rtol=2e-6)
        error = (softmax(logits) - one_hot) / len(labels)
        grads = [np.swapaxes(x, -1, -2) @ error, error.sum(-2, keepdims=True)]
        rate = 0.05 * (1 + np.cos(np.pi * step / 7)) / 2
        for i, g in enumerate(grads):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            mean, square = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.999 ** (step + 1))
            heads[i] = heads[i] - rate * (mean / (np.sqrt(square) + 1e-8) + weight_decay * heads[i])
    assert int(state.step) == 3
    np.testing.assert_allclose(state.heads["kernel"], heads[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(state.heads["bias"], heads[1], rtol=0, atol=2e-6)
    found = probes.logits(state, features)
    np.testing.assert_allclose(found, x @ heads[0] + heads[1], rtol=0, atol=4e-5)


def test_converged_classifiers_are_those_of_scikit_learn():
    """Classes overlap, so that there is an optimum without a penalty."""
    probes = LinearProbes(GRID, WIDTH, CLASSES, 4000, 0.05)
    features, labels = batch(200)
    new, _ = batch(30, seed=1)

    @jax.jit
    def trained(features, labels):
        step = lambda state, _: (probes.update(state, features, labels)[0], None)  # noqa: E731
        return lax.scan(step, probes.init(), length=probes.steps)[0]

    state = trained(features, labels)
    ours = softmax(np.asarray(probes.logits(state, new), np.float64))
    for cell in np.ndindex(*GRID):
        model = LogisticRegression(C=np.inf, max_iter=2000, tol=1e-10)
        model.fit(np.float64(features[cell]), labels)
        theirs = model.predict_proba(np.float64(new[cell]))
        np.testing.assert_allclose(ours[cell], theirs, rtol=0, atol=2e-3)
        assert np.ptp(theirs) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_classifier_is_trained_as_if_it_were_alone(norm):
    together = LinearProbes(GRID, WIDTH, CLASSES, 9, 0.05, norm=norm)
    alone = LinearProbes((1, 1), WIDTH, CLASSES, 9, 0.05, norm=norm)
    states = [probes.init() for probes in (together, alone)]
    for step in range(3):
        features, labels = batch(20, seed=step)
        states[0], _ = together.update(states[0], features, labels)
        states[1], _ = alone.update(states[1], features[1:2, 2:3], labels)
    for name in ("kernel", "bias"):
        found = states[0].heads[name][1, 2]
        np.testing.assert_allclose(found, states[1].heads[name][0, 0], rtol=0, atol=1e-6)


def test_batch_normalisation_is_by_the_batch_and_later_by_running_averages():
    probes = LinearProbes(GRID, WIDTH, CLASSES, 9, 0.05, norm="batch")
    plain = LinearProbes(GRID, WIDTH, CLASSES, 9, 0.05)
    state, reference = probes.init(), plain.init()
    mean, variance = np.zeros((*GRID, 1, WIDTH)), np.ones((*GRID, 1, WIDTH))
    for step in range(2):
        features, labels = batch(11, seed=step)
        x = np.float64(features)
        centre, spread = x.mean(2, keepdims=True), x.var(2, keepdims=True)
        seen = jnp.asarray((x - centre) / np.sqrt(spread + EPSILON), jnp.float32)
        mean = (1 - MOMENTUM) * mean + MOMENTUM * centre
        variance = (1 - MOMENTUM) * variance + MOMENTUM * spread * 11 / 10
        state, _ = probes.update(state, features, labels)
        reference, _ = plain.update(reference, seen, labels)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(state.variance, variance, rtol=1e-5)
    new, _ = batch(3, seed=5)
    seen = jnp.asarray((np.float64(new) - mean) / np.sqrt(variance + EPSILON), jnp.float32)
    expected = plain.logits(reference, seen)
    np.testing.assert_allclose(probes.logits(state, new), expected, rtol=0, atol=2e-5)


def test_cross_entropy_is_a_mean_over_images_in_nats():
    logits = jnp.log(jnp.asarray([[[[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]]]]))
    found = cross_entropy(logits, jnp.asarray([2, 0]))
    np.testing.assert_allclose(found, [[-(np.log(0.2) + np.log(0.5)) / 2]], rtol=1e-6)


def test_flops_of_a_step_are_those_of_its_products():
    # Six cells; two FLOPs a product, which the convention counts three times.
    assert LinearProbes(GRID, WIDTH, CLASSES, 1).flops_per_image() == 6 * 6 * WIDTH * CLASSES
