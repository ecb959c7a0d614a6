"""Dispersive loss against its formula; pairs are the same on any number of devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiers import slow_but
from vectors import quick_jit

from ig_jax.config import run_config
from ig_jax.config.run_config import ConfigError
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import NoisedBatch
from ig_jax.parallel.mesh import to_global
from ig_jax.training import step
from ig_jax.types import NetOutput

B, N, D = 6, 3, 5
FIELDS = {"weight": 0.5, "depth": 2, "tau": 0.7}


def loss(tokens, **fields):
    """Of each image, where the network's tokens after block 2 are `tokens`."""
    x = jnp.zeros((len(tokens), 2, 2, 1))
    out = NetOutput(pred=x, heads={}, features={2: jnp.asarray(tokens), 1: jnp.ones_like(tokens)})
    rest = {name: x for name in ("x0", "noise", "x_t", "target")}
    zeros = jnp.zeros(len(x), jnp.int32)
    batch = NoisedBatch(**rest, t=jnp.ones(len(x)), y=zeros, out=out)
    return TERMS["dispersive"](**{**FIELDS, **fields})(batch)


def tokens(seed: int = 0) -> np.ndarray:
    """Far from zero and of unlike sizes: distances are small beside the tokens."""
    rng = np.random.default_rng(seed)
    return (7 + rng.standard_normal((B, N, D)) * rng.uniform(0.2, 1.5, (B, 1, 1))).astype("float32")


def by_formula(z: np.ndarray, tau: float) -> float:
    z = z.astype(np.float64).reshape(len(z), -1)
    pairs = [np.exp(-np.mean((a - b) ** 2) / tau) for a in z for b in z]
    return np.log(np.mean(pairs))


def test_the_loss_is_the_log_of_the_mean_over_all_pairs():
    z = tokens()
    np.testing.assert_allclose(loss(z), np.full(B, by_formula(z, 0.7)), rtol=2e-6)


@pytest.mark.parametrize("size", slow_but([2], [2, 3]))
def test_images_are_paired_with_their_neighbours(size):
    z = tokens(1)
    parts = [by_formula(part, 0.7) for part in z.reshape(-1, size, N, D)]
    np.testing.assert_allclose(loss(z, group_size=size), np.repeat(parts, size), rtol=2e-6)


@pytest.mark.slow
def test_equal_images_cost_nothing_and_the_gradient_is_that_of_the_formula():
    one = tokens()[:1]
    np.testing.assert_allclose(loss(np.repeat(one, 4, axis=0)), np.zeros(4), atol=1e-6)
    z = tokens(2)
    found = jax.grad(lambda z: jnp.mean(loss(z)))(jnp.asarray(z))
    move = np.random.default_rng(3).standard_normal(z.shape)
    ends = [by_formula(z + e * move, 0.7) for e in (1e-5, -1e-5)]
    assert np.sum(found * move) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)


def advanced(devices: int, mesh: dict[str, int]):
    """State and metrics after one step on as many devices."""
    terms = {"flow": {"weight": 1.0}, "dispersive": {**FIELDS, "group_size": 4}}
    # A large epsilon: where a gradient is rounding alone, Adam must not make a step of it.
    optim = {**tiny.get_config().optim.to_dict(), "eps": 1e-2}
    changes = {"objective.terms": terms, "mesh": mesh, "model.remat": "dots", "optim": optim}
    exp = tiny.experiment(changes, jax.devices()[:devices])
    source, size = exp.config.data.source, exp.config.train.batch_size
    batch = to_global(source.batch(np.arange(size)[::-1]), exp.mesh, size)
    update = quick_jit(partial(step.train_step, exp=exp))
    return jax.tree.map(np.asarray, update(step.init_state(exp), batch))


@pytest.mark.slow
def test_pairs_are_the_same_on_any_number_of_devices():
    state, found = advanced(1, {"data": 1, "fsdp": 1, "tensor": 1})
    state_2, found_2 = advanced(2, {"data": 1, "fsdp": 2, "tensor": 1})
    for name in ("loss/dispersive", "grad_norm"):
        np.testing.assert_allclose(found_2[name].value, found[name].value, rtol=1e-5)
    near = partial(np.testing.assert_allclose, rtol=0, atol=1e-7)
    jax.tree.map(near, state_2.params, state.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 5}, "dispersive: group_size = 5: must divide the 16 images that a device"),
        ({"group_size": 1}, "dispersive.group_size = 1: must be at least 2, or None for all"),
        ({"tau": 0.0}, "dispersive.tau = 0.0: must be above 0"),
        ({"depth": 3}, "dispersive: reads the tokens of block 3, which must lie in 1..2"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, message):
    terms = {"flow": {"weight": 1.0}, "dispersive": {**FIELDS, **changes}}
    with pytest.raises(ConfigError, match=message) as error:
        run_config.parse(tiny.settings({"objective.terms": terms}))
    assert "\n" not in str(error.value)


def test_one_image_at_a_time_has_no_pairs():
    terms = {"flow": {"weight": 1.0}, "dispersive": FIELDS}
    with pytest.raises(ConfigError, match="dispersive: pairs images, but a device has one"):
        run_config.parse(tiny.settings({"objective.terms": terms, "train.batch_size": 1}))
