"""Standard errors against the spread of many sets, and influences against finite differences."""

import numpy as np
import pytest

from ig_jax.metrics import influence
from ig_jax.metrics.frechet import frechet_distance
from ig_jax.metrics.inception_score import inception_score
from ig_jax.metrics.moments import Gaussian, Moments

RNG = np.random.default_rng(0)


def real(d: int) -> Gaussian:
    root = RNG.normal(size=(d, d)) / np.sqrt(d)
    return Gaussian(0.3 * RNG.normal(size=d), root @ root.T + 0.1 * np.eye(d))


def distance(known: Gaussian, features: np.ndarray, weights: np.ndarray) -> float:
    """Of samples that count differently, in the limit of many."""
    weights = weights / weights.sum()
    mean = weights @ features
    centred = features - mean
    return frechet_distance(known, Gaussian(mean, (weights[:, None] * centred).T @ centred))


def test_influences_on_a_frechet_distance_are_its_derivatives_by_weight():
    known, features = real(5), RNG.standard_t(7, size=(240, 5))
    found = influence.of_frechet_distance(known, features)
    ones, step = np.ones(240), 1e-4
    for i in (0, 7, 31, 239):
        more, less = (ones + sign * step * 240 * (np.arange(240) == i) for sign in (1, -1))
        slope = (distance(known, features, more) - distance(known, features, less)) / (2 * step)
        # The covariance that is reported divides by n - 1.
        assert found[i] == pytest.approx(slope, rel=0.03, abs=0.03)
    assert abs(found.mean()) < 0.05 * np.abs(found).max()


@pytest.mark.parametrize(("d", "n"), [(4, 200), (16, 300)])
def test_the_error_of_a_frechet_distance_is_the_spread_over_sets(d, n):
    known, rng = real(d), np.random.default_rng(d)
    values, errors = [], []
    for _ in range(120):
        features = 0.8 * rng.standard_t(7, size=(n, d))
        values.append(frechet_distance(known, Moments.from_features(features).gaussian))
        influences = influence.of_frechet_distance(known, features)
        errors.append(influence.standard_error(influences))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.25)


def test_the_error_of_an_inception_score_is_the_spread_over_sets():
    rng = np.random.default_rng(2)
    weights = 1.5 * rng.normal(size=(6, 10))
    values, errors = [], []
    for _ in range(300):
        logits = (rng.normal(size=(300, 6)) @ weights).astype(np.float32)
        values.append(inception_score(logits, 10**6)[0])
        errors.append(influence.standard_error(influence.of_inception_score(logits)))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_an_error_falls_with_the_root_of_the_number():
    known, features = real(3), RNG.normal(size=(100, 3))
    once, four = (
        influence.standard_error(influence.of_frechet_distance(known, np.tile(features, (k, 1))))
        for k in (1, 4)
    )
    assert four == pytest.approx(once / 2, rel=0.02)


def test_too_few_samples_have_no_error():
    with pytest.raises(ValueError, match="7 samples of 4 features: needs twice as many"):
        influence.of_frechet_distance(real(4), RNG.normal(size=(7, 4)))
