"""All blocks of a transformer under one scan, with any number of exits on the way.

Every matrix of the blocks is one stack [depth, ...]. Tokens wanted after some blocks (for readouts
and taps) leave through a carry buffer of K+1 slots: slot k belongs to the k-th exit, the last one
is scratch that the other blocks overwrite. With all blocks unrolled they are simply kept. Slicing
the stack at the readout instead would copy half the weights forward and concatenate their gradients
backward, and would tie the parameter layout to where the readout sits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ig_jax.types import Params

# What goes from block to block: tokens [b, n, d], or a pytree of them and what changes beside them.
State = Any
Block = Callable[[Params, State], State]

# What the backward pass keeps of each block. 'none' keeps everything, 'full' recomputes everything.
# Only lists of what to save: a list of what *not* to save keeps gathered weights under sharding.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Between(NamedTuple):
    """A change of the state between two blocks."""

    depth: int  # of the block (from 1) after which it comes; not the last
    apply: Callable[[State], State]


def jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit` of a program that runs blocks; no other jitted function may call it.

    XLA for CPUs takes barriers away before it fuses, and `run_blocks` needs them.
    """
    kept = {"xla_disable_hlo_passes": "cse_barrier_expander"} if _on_cpu() else {}
    return jax.jit(function, compiler_options=kept, **options)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _apart(block: Block, unroll: int) -> Block:
    """`block`, whose result is computed once, whatever it goes into.

    XLA for CPUs would fuse the sum of the residual stream, and of its gradient, into each of its
    many readers, through all blocks that are written out one after the other: half of a step.
    """
    if unroll == 1 or not _on_cpu():
        return block
    return lambda params, x: lax.optimization_barrier(block(params, x))


def rematerialised(block: Callable, remat: str, *, looped: bool = True) -> Callable:
    """`block` under the named policy of `REMAT`.

    Args:
      looped: whether forward and backward pass are loops of their own. XLA would otherwise see
        that the same is computed twice, and keep it instead: that must be forbidden.
    """
    policy = REMAT[remat]
    if policy is None:
        return block
    return jax.checkpoint(block, policy=policy, prevent_cse=not looped)


def run_blocks(
    block: Block,
    stacked: Params,
    x: State,
    *,
    exits: tuple[int, ...],
    unroll: int,
    remat: str = "none",
    between: Between | None = None,
) -> tuple[State, Mapping[int, State]]:
    """Applies `block(params_i, x)` for every slice i of `stacked`.

    Args:
      block: one transformer block, everything but its parameters and the state closed over.
      stacked: parameters with a leading axis of the depth.
      x: the state before the first block.
      exits: depths (1 = after the first block) whose state is returned.
      unroll: blocks per iteration of the scan; 1 compiles a single body, the depth writes out all.
      remat: a name of `REMAT`.
      between: what changes the state on the way; an exit at its depth comes before it.

    Returns:
      The state after the last block, and {depth: state after that block} for `exits`.
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]
    block = _apart(block, unroll)
    if unroll >= depth:
        block = rematerialised(block, remat, looped=False)
        return _one_by_one(block, stacked, x, exits, between)
    if between:
        block, stacked = _changed_in_loop(block, stacked, between, depth)
    block = rematerialised(block, remat)
    depths = sorted(set(exits))
    slots = np.full(depth, len(depths), np.int32)
    slots[np.array(depths, int) - 1] = np.arange(len(depths))

    def body(carry, layer):
        x, buffer = carry
        params, slot = layer
        x = block(params, x)
        return (x, jax.tree.map(lambda b, v: _put(b, v, slot), buffer, x)), None

    if not depths:
        x, _ = lax.scan(lambda x, p: (block(p, x), None), x, stacked, unroll=unroll)
        return x, {}
    buffer = jax.tree.map(lambda v: _slots(v, len(depths) + 1), x)
    (x, buffer), _ = lax.scan(body, (x, buffer), (stacked, jnp.asarray(slots)), unroll=unroll)
    return x, {d: jax.tree.map(lambda b, k=k: b[k], buffer) for k, d in enumerate(depths)}


def _slots(x: jax.Array, count: int) -> jax.Array:
    # Derived from x rather than a constant, so that it is sharded as x is.
    return jnp.broadcast_to(0 * x, (count, *x.shape))


def _put(buffer: jax.Array, x: jax.Array, slot: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(buffer, x, slot, 0)


def _changed_in_loop(
    block: Block, stacked: Params, between: Between, depth: int
) -> tuple[Block, Any]:
    """A block that begins with the change where it is due, and its stack.

    One condition in one loop: a loop before the change and one behind it would each copy their
    half of the weights, and compile a body of their own. It stands at the beginning of a block, so
    that the backward pass computes it again from what is kept of that block anyway.
    """
    apply = jax.checkpoint(between.apply, prevent_cse=False)

    def changed(layer: tuple[Params, jax.Array], x: State) -> State:
        params, due = layer
        return block(params, lax.cond(due, apply, lambda x: x, x))

    return changed, (stacked, jnp.arange(depth) == between.depth)


def first_blocks(
    block: Block,
    stacked: Params,
    x: State,
    *,
    exits: tuple[int, ...],
    unroll: int,
    between: Between | None = None,
) -> Mapping[int, State]:
    """The state after the blocks `exits`, without computing any block behind the last of them.

    For passes without a gradient: that of the stack would be summed once a block.

    Args:
      block, stacked, x, unroll, between: see `run_blocks`.
      exits: depths (1 = after the first block), at least one.
    """
    left, block = {}, _apart(block, unroll)

    def body(x: State, i: jax.Array) -> tuple[State, None]:
        # One block of the whole stack: slicing off the first blocks would copy them.
        return block(jax.tree.map(lambda leaf: leaf[i], stacked), x), None

    start, on_the_way = 0, between is not None and between.depth < max(exits)
    for depth in sorted({*exits, *([between.depth] if on_the_way else [])}):
        x, _ = lax.scan(body, x, jnp.arange(start, depth), unroll=min(unroll, depth - start))
        left[depth], start = x, depth
        if on_the_way and depth == between.depth:
            x = between.apply(x)
    return {depth: left[depth] for depth in exits}


def _one_by_one(
    block: Block, stacked: Params, x: State, exits: tuple[int, ...], between: Between | None
) -> tuple[State, Mapping[int, State]]:
    """`run_blocks` without a loop: nothing is copied into a buffer at every block."""
    leaves, structure = jax.tree.flatten(stacked)
    # The gradient of `unstack` is one stack; that of x[i] would be a whole stack for every block.
    layers = zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)
    left = {}
    for depth, layer in enumerate(layers, 1):
        x = block(structure.unflatten(layer), x)
        if depth in exits:
            left[depth] = x
        if between and depth == between.depth:
            x = between.apply(x)
    return x, left
