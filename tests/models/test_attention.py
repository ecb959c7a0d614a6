"""Attention in the order that suits a CPU, against that of jax.nn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax.models import layers


def given(n=7):
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.standard_normal((2, n, 3, 5)) for _ in range(4))
    # Scores of some tokens are far from 0, so that exponentials need their largest taken off.
    return [jnp.asarray(x, jnp.float32) for x in (4 * q, 8 * k + 3, v + 1, weight)]


def seen_by_groups(n=7):
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, n)))
    return (ids[:, :, None] == ids[:, None, :])[:, None]


@pytest.mark.parametrize("mask", [None, seen_by_groups()], ids=["all", "groups"])
def test_values_and_gradients_are_those_of_the_reference(mask):
    q, k, v, weight = given()

    def reference(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")

    def ours(q, k, v):
        return layers.attend_on_cpu(q, k, v, mask)

    def both(attend):
        found, backward = jax.vjp(attend, q, k, v)
        return [found, *backward(weight)]

    for found, expected in zip(both(ours), both(reference), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_no_score_is_too_large_and_one_token_sees_itself():
    q, k, v, _ = given()
    assert jnp.isfinite(layers.attend_on_cpu(1e3 * q, 1e3 * k, v, None)).all()
    q, k, v, _ = given(n=1)
    np.testing.assert_allclose(layers.attend_on_cpu(q, k, v, None), v, rtol=1e-6)
