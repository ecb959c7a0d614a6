"""SRA 2 against its formula written out, and which parameters its gradient reaches."""

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
import tiny

from ig_jax import pytree
from ig_jax.config import run_config
from ig_jax.config.run_config import ConfigError
from ig_jax.diffusion.flow import Flow
from ig_jax.models import embed
from ig_jax.models.sit import SIZES
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import NoisedBatch, Objective
from ig_jax.objectives.distances import smooth_l1
from ig_jax.optim.train_state import trained
from ig_jax.types import NetOutput

TERM = TERMS["sra2"](weight=1.0, depth=2)
NET = lively.make(depth=4)  # patches of 2 x 2 of latents 4 x 4 x 3


def normal(seed: int, shape) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def head(seed: int = 0):
    """Every leaf drawn, biases included."""
    shapes = jax.eval_shape(lambda: TERM.init(jax.random.key(0), NET))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes
    )


def batch(dtype=jnp.float32) -> NoisedBatch:
    tokens = jnp.asarray(normal(1, (3, 4, NET.settings.hidden_size)))
    x0 = jnp.asarray(normal(2, (3, 4, 4, 3)))
    out = NetOutput(pred=x0, heads={}, features={4: tokens + 1, 2: tokens})
    rest = {"noise": x0 + 1, "x_t": x0 + 2, "target": x0 + 3}
    return NoisedBatch(
        x0=x0, **rest, t=jnp.ones(3), y=jnp.zeros(3, jnp.int32), out=out, dtype=dtype
    )


def by_hand(p: NoisedBatch, layers) -> np.ndarray:
    """The loss of each example, token by token and number by number, float64."""
    losses = []
    for tokens, x0 in zip(np.float64(p.out.features[2]), np.float64(p.x0), strict=True):
        each = []
        for n, token in enumerate(tokens):
            x = token
            for i in range(1, 6):
                x = x if i == 1 else x / (1 + np.exp(-x))
                x = x @ np.float64(layers[f"fc{i}"]["kernel"]) + np.float64(
                    layers[f"fc{i}"]["bias"]
                )
            row, column = 2 * (n // 2), 2 * (n % 2)
            patch = x0[row : row + 2, column : column + 2].ravel()
            for error in x - patch:
                each.append(error**2 / 0.1 if abs(error) < 0.05 else abs(error) - 0.025)
        losses.append(np.mean(each))
    return np.array(losses)


def test_the_loss_is_the_smooth_l1_distance_of_projected_tokens_to_their_clean_patches():
    np.testing.assert_allclose(TERM(batch(), head()), by_hand(batch(), head()), rtol=1e-5)


@pytest.mark.slow
def test_products_in_bfloat16_give_the_loss_up_to_their_rounding():
    exact, half = (np.asarray(TERM(batch(d), head())) for d in (jnp.float32, jnp.bfloat16))
    assert half.dtype == np.float32 and not np.array_equal(half, exact)
    np.testing.assert_allclose(half, exact, rtol=2e-2)


def test_smooth_l1_is_a_square_below_beta_a_line_above_and_smooth_where_they_meet():
    errors = jnp.array([0.2, -0.05, 0.0, 0.049, -3.0, 0.01])
    expected = [0.175, 0.025, 0.0, 0.02401, 2.975, 0.001]
    np.testing.assert_allclose(smooth_l1(errors, 0.05), expected, rtol=1e-5)
    slopes = jax.vmap(jax.grad(lambda e: smooth_l1(e, 0.05)))(errors)
    np.testing.assert_allclose(slopes, [1, -1, 0, 0.98, -1, 0.2], rtol=1e-5)


def test_patchify_undoes_unpatchify_and_names_row_column_and_channel_in_this_order():
    tokens = normal(0, (2, 9, 12))
    latents = embed.unpatchify(jnp.asarray(tokens), 2)
    np.testing.assert_array_equal(embed.patchify(latents, 2), tokens)
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(embed.patchify(jnp.asarray(x), 2)[0, 1], [2, 3, 6, 7])


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [1, 4])
def test_the_gradient_reaches_the_head_and_the_blocks_up_to_the_tapped_one_alone(unroll):
    net = lively.make(depth=4, unroll=unroll)
    objective = Objective(
        net=net,
        process=Flow("linear", "uniform"),
        terms={"sra2": TERM},
        label_drop=0.0,
        null_class=lively.CLASSES,
    )
    x, _, y = lively.inputs(net)
    draws = objective.draw(jax.random.key(0), x)
    params = trained(lively.parameters(net), {"sra2": head()})
    gradient = jax.grad(lambda p: objective(p, x, y, draws)[0])(params)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient["terms"]))
    for path, leaf in pytree.flatten(gradient["blocks"]).items():
        assert [bool(np.any(block != 0)) for block in leaf] == [True, True, False, False], path
    for name in ("final_layer", "heads"):
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient[name]))


def test_the_head_of_an_xl_has_the_18_million_parameters_of_the_paper():
    _, width, heads = SIZES["XL"]
    net = lively.make(side=32, channels=4, hidden_size=width, num_heads=heads)
    shapes = jax.eval_shape(lambda: TERM.init(jax.random.key(0), net))
    matrices = {path: x.shape for path, x in pytree.flatten(shapes).items() if len(x.shape) == 2}
    assert list(matrices.values()) == [(1152, 2304), *[(2304, 2304)] * 3, (2304, 16)]
    assert pytree.count(shapes) == 18_625_552


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 3}, "objective.terms.sra2: reads the tokens of block 3.*1..2"),
        ({"depth": 0}, "objective.terms.sra2: reads the tokens of block 0.*1..2"),
        ({}, "objective.terms.sra2.depth: missing"),
        ({"depth": 1, "beta": 0.1}, "objective.terms.sra2.beta: unknown field"),
        ({"depth": 1, "weight_factor": 1.5}, r"weight_factor = 1.5: must lie in \(0, 1\]"),
        ({"depth": 1, "constant_epochs": -1}, "constant_epochs = -1: must not be negative"),
    ],
)
def test_a_block_that_is_not_there_or_an_unknown_field_is_refused_by_name(fields, message):
    terms = {"flow": {"weight": 1.0}, "sra2": {"weight": 1.0, **fields}}
    with pytest.raises(ConfigError, match=message):
        run_config.parse(tiny.settings({"objective.terms": terms}))
