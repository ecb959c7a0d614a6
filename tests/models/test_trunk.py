"""The scan over blocks, forward and backward.

Forward on blocks that are one multiply-add, backward on a whole SiT against slopes.
"""

import functools

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
from tiers import slow_but

from ig_jax import pytree
from ig_jax.models import trunk


@pytest.mark.parametrize(
    "exits", slow_but([(2, 1), (2, 2, 3)], [(), (3,), (2, 1), (2, 2, 3), (1, 2, 3)])
)
@pytest.mark.parametrize("unroll", [1, 3])
def test_any_exits_leave_the_trunk_with_the_tokens_after_their_block(exits, unroll):
    stacked = {"a": jnp.array([2.0, 3.0, 5.0]), "b": jnp.array([1.0, 10.0, 100.0])}
    after = {1: 3.0, 2: 19.0, 3: 195.0}  # x -> a x + b from 1
    x, left = trunk.run_blocks(
        lambda p, x: p["a"] * x + p["b"], stacked, jnp.ones((1, 1, 1)), exits=exits, unroll=unroll
    )
    assert x.item() == after[3]
    assert {d: tokens.item() for d, tokens in left.items()} == {d: after[d] for d in exits}


@pytest.mark.parametrize("depth", slow_but([2], [1, 2]))
@pytest.mark.parametrize("unroll", slow_but([1, 3], [1, 2, 3]))
def test_a_change_between_two_blocks_comes_after_the_exit_at_its_depth(depth, unroll):
    stacked = {"a": jnp.array([2.0, 3.0, 5.0]), "b": jnp.array([1.0, 10.0, 100.0])}
    between = trunk.Between(depth, lambda state: (state[0], state[1] + state[0]))

    def block(p, state):
        return p["a"] * state[0] + p["b"] + 1000 * state[1], state[1]

    after, x, c = {}, 1.0, 0.5
    for i, (a, b) in enumerate([(2, 1), (3, 10), (5, 100)], 1):
        x = a * x + b + 1000 * c
        after[i] = (x, c)
        c += x if i == depth else 0

    start = jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 0.5)
    options = {"unroll": unroll, "between": between}
    last, left = trunk.run_blocks(block, stacked, start, exits=(2, 1), **options)
    assert (last[0].item(), last[1].item()) == (after[3][0], c)
    assert {d: (x.item(), c.item()) for d, (x, c) in left.items()} == {d: after[d] for d in (1, 2)}
    for exits in ((1,), (3, 2), (2, 1, 3)):
        found = trunk.first_blocks(block, stacked, start, exits=exits, **options)
        assert {d: (x.item(), c.item()) for d, (x, c) in found.items()} == {
            d: after[d] for d in exits
        }


def loss_and_gradient(params, **changes):
    loss = functools.partial(lively.weighted_sum, lively.make(**changes))
    return lively.compile_quickly(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def params():
    return lively.parameters(lively.make())


@pytest.fixture(scope="module")
def plain(params):
    return loss_and_gradient(params)


@pytest.mark.parametrize(
    "changes", slow_but([{"unroll": 3}], [{"unroll": 3}, {"remat": "dots"}, {"remat": "full"}])
)
def test_unrolling_and_recomputing_change_neither_output_nor_gradient(changes, params, plain):
    lively.close(loss_and_gradient(params, **changes), plain)


def test_recomputing_more_keeps_less_for_the_backward_pass(params):
    def kept(remat: str) -> int:
        loss = functools.partial(lively.weighted_sum, lively.make(remat=remat))
        return pytree.num_bytes(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))

    assert kept("full") < kept("dots") < kept("none")


@pytest.mark.parametrize(("unroll", "forbidden"), [(1, False), (2, False), (3, True)])
def test_keeping_what_should_be_recomputed_is_forbidden_where_no_loop_prevents_it(
    unroll, forbidden
):
    """With all three blocks unrolled XLA would see that the backward pass computes them again."""
    stacked = {"a": jnp.ones(3)}

    def block(p, x):
        return jnp.sin(p["a"] * x)

    def loss(p):
        x = jnp.ones((1, 1, 1))
        return trunk.run_blocks(block, p, x, exits=(), unroll=unroll, remat="full")[0].sum()

    found = str(jax.make_jaxpr(jax.grad(loss))(stacked))
    assert (f"prevent_cse={forbidden}" in found) and (f"prevent_cse={not forbidden}" not in found)


@pytest.mark.slow
def test_the_gradient_is_the_slope_of_the_output_along_every_parameter(params, plain):
    """Central differences; outputs of readouts and of the last block all enter."""
    loss = lively.compile_quickly(functools.partial(lively.weighted_sum, lively.make()))
    rng, step = np.random.default_rng(3), 0.01
    leaves, slopes = pytree.flatten(params), pytree.flatten(plain[1])
    for name, leaf in leaves.items():
        way = rng.standard_normal(leaf.shape).astype(np.float32)
        way /= np.linalg.norm(way)
        there, back = (
            loss(pytree.unflatten({**leaves, name: leaf + sign * step * way})) for sign in (1, -1)
        )
        slope = (float(there) - float(back)) / (2 * step)
        assert float(np.sum(way * slopes[name])) == pytest.approx(slope, abs=0.01), name


def gradient_of_blocks(depth, unroll):
    """The compiled program of residual blocks that read their tokens more than once."""

    def block(p, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        return x + p["gate"][None] * (jnp.tanh(centred @ p["a"]) @ p["b"])

    def loss(stacked, x):
        last, _ = trunk.run_blocks(block, stacked, x, exits=(), unroll=unroll)
        return jnp.sum(jnp.square(last))

    stacked = {name: jnp.ones((depth, 16, 16)) for name in ("a", "b")}
    stacked["gate"] = jnp.ones((depth, 16))
    return trunk.jit(jax.grad(loss)).lower(stacked, jnp.ones((32, 16))).compile()


@pytest.mark.parametrize("unroll", slow_but([1, 6], [1, 2, 6]))
def test_blocks_that_are_written_out_stay_apart_on_a_cpu(unroll):
    text = gradient_of_blocks(6, unroll).as_text()
    assert ("opt-barrier" in text) == (unroll > 1)


def test_a_cpu_computes_each_sum_of_the_residual_stream_once():
    """Sums of all blocks so far, anew in each block, would make the work grow faster than depth."""
    twelve, six = (gradient_of_blocks(n, n).cost_analysis()["flops"] for n in (12, 6))
    assert twelve < 2.1 * six


def test_a_program_of_blocks_is_no_part_of_another():
    """Callers may compile a network into their own programs, but not these."""
    double = trunk.jit(lambda x: 2 * x)
    assert double(jnp.float32(3)) == 6
    with pytest.raises(ValueError, match="top-level"):
        jax.jit(double)(jnp.float32(3))
