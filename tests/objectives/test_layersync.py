"""LayerSync against its formula, and which parameters its gradient reaches."""

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
import tiny
from vectors import quick_jit

from ig_jax import pytree
from ig_jax.config import run_config
from ig_jax.config.run_config import ConfigError
from ig_jax.diffusion.flow import Flow
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import NoisedBatch, Objective
from ig_jax.types import NetOutput

B, N, D = 3, 4, 5


def tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, N, D)).astype(np.float32)


def loss(features, depth: int = 2, target_depth: int = 7):
    """Of each example, where the network's tokens are `features`."""
    features = {block: jnp.asarray(array) for block, array in features.items()}
    x = jnp.zeros((B, 2, 2, 1))
    out = NetOutput(pred=x, heads={}, features=features)
    rest = {name: x for name in ("x0", "noise", "x_t", "target")}
    batch = NoisedBatch(**rest, t=jnp.ones(B), y=jnp.zeros(B, jnp.int32), out=out)
    return TERMS["layersync"](0.2, depth, target_depth)(batch)


def test_the_loss_is_minus_the_cosine_over_channels_meaned_over_tokens():
    a, b = tokens(0), tokens(1)
    expected = [
        -np.mean([u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in zip(x, y, strict=True)])
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(loss({7: b, 2: a, 4: tokens(2)}), expected, rtol=1e-6)


def test_equal_directions_cost_minus_1_and_opposite_ones_1_whatever_their_length():
    a = tokens(0)
    scale = np.exp(np.random.default_rng(3).standard_normal((B, N, 1)))
    for sign in (1, -1):
        found = loss({2: a, 7: (sign * scale * a).astype(np.float32)})
        np.testing.assert_allclose(found, np.full(B, -sign), atol=1e-6)


def test_the_gradient_is_that_with_the_later_tokens_held_constant():
    a, b = jnp.asarray(tokens(0)), jnp.asarray(tokens(1))
    gradient = jax.grad(lambda features: jnp.sum(loss(features)))({2: a, 7: b})
    assert np.all(gradient[7] == 0)
    # d cos / d a = (b / |b| - cos a / |a|) / |a|, of each token.
    norms = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b)]
    cos = np.sum(a * b, axis=-1, keepdims=True) / (norms[0] * norms[1])
    expected = -(b / norms[1] - cos * a / norms[0]) / norms[0] / N
    np.testing.assert_allclose(gradient[2], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [1, 4])
@pytest.mark.parametrize("depths", [(1, 2), (2, 4)])
def test_no_gradient_reaches_a_block_behind_the_one_that_learns(depths, unroll):
    net = lively.make(depth=4, unroll=unroll)
    params = lively.parameters(net)
    objective = Objective(
        net=net,
        process=Flow("linear", "uniform"),
        terms={"layersync": TERMS["layersync"](0.2, *depths)},
        label_drop=0.0,
        null_class=lively.CLASSES,
    )
    x, _, y = lively.inputs(net)
    draws = objective.draw(jax.random.key(0), x)
    gradient = quick_jit(jax.grad(lambda p: objective(p, x, y, draws)[0]))(params)
    for path, leaf in pytree.flatten(gradient["blocks"]).items():
        reached = [bool(np.any(block != 0)) for block in leaf]
        assert reached == [depth <= depths[0] for depth in range(1, 5)], path
    for name in ("final_layer", "heads"):
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient[name]))
    for name in ("x_embedder", "t_embedder"):
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient[name]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"depth": 1, "target_depth": 3},
            r"objective.terms.layersync: reads the tokens of block 3, which must lie in 1..2 "
            r"\(model.depth = 2\)",
        ),
        ({"depth": 0, "target_depth": 2}, r"layersync: reads the tokens of block 0.*1..2"),
        (
            {"depth": 2, "target_depth": 2},
            "objective.terms.layersync.target_depth = 2: must be above depth = 2",
        ),
        ({"depth": 2, "target_depth": 1}, "layersync.target_depth = 1: must be above depth = 2"),
        ({"depth": 1}, "objective.terms.layersync.target_depth: missing"),
        ({"depth": 1, "target": 2}, "objective.terms.layersync.target: unknown field"),
        ({"depth": 1, "target_depth": 2, "weight": -1.0}, "weight = -1.0: must not be negative"),
    ],
)
def test_blocks_that_are_not_there_or_in_the_wrong_order_are_refused_by_name(fields, message):
    terms = {"flow": {"weight": 1.0}, "layersync": {"weight": 0.2, **fields}}
    with pytest.raises(ConfigError, match=message) as error:
        run_config.parse(tiny.settings({"objective.terms": terms}))
    assert "\n" not in str(error.value)
