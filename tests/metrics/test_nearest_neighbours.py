"""Nearest neighbours against NumPy and scikit-learn."""

import jax.numpy as jnp
import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from ig_jax.metrics.nearest_neighbours import unit_length, vote

K, CLASSES = 5, 4


def drawn(n: int, seed: int):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n).astype(np.int32)
    directions = np.random.default_rng(9).standard_normal((CLASSES, 6))
    # Lengths differ widely: without normalisation other rows would be nearest.
    lengths = rng.uniform(0.1, 10, (n, 1))
    features = lengths * (directions[labels] + 1.5 * rng.standard_normal((n, 6)))
    return jnp.asarray(features, jnp.float32), jnp.asarray(labels)


def test_classes_are_those_of_numpy_and_of_scikit_learn():
    (bank, labels), (queries, _) = drawn(150, 0), drawn(70, 1)
    found = vote(unit_length(queries), unit_length(bank), labels, k=K, num_classes=CLASSES)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.float64, (queries, bank)))
    nearest = np.argsort(-(a @ b.T), axis=1, kind="stable")[:, :K]
    labels = np.asarray(labels)
    votes = np.stack([(labels[nearest] == c).sum(1) for c in range(CLASSES)], axis=1)
    np.testing.assert_array_equal(found, votes.argmax(1))
    assert np.sum(np.sort(votes)[:, -1] == np.sort(votes)[:, -2]) > 5  # ties there are
    model = KNeighborsClassifier(K, metric="cosine", algorithm="brute").fit(bank, labels)
    np.testing.assert_array_equal(found, model.predict(queries))


def test_a_feature_of_zeros_stays_finite():
    rows = jnp.asarray([[0.0, 0.0], [3.0, -4.0]])
    np.testing.assert_allclose(unit_length(rows), [[0, 0], [0.6, -0.8]], rtol=1e-6)
