"""All blocks of a transformer under one scan, with any number of exits on the way.

Every matrix of the blocks is one stack [depth, ...]. Tokens wanted after some blocks (for readouts
and taps) leave through a carry buffer of K+1 slots: slot k belongs to the k-th exit, the last one
is scratch that the other blocks overwrite. With all blocks unrolled they are simply kept. Slicing
the stack at the readout instead would copy half the weights forward and concatenate their gradients
backward, and would tie the parameter layout to where the readout sits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ig_jax.types import Params, Tokens

# What the backward pass keeps of each block. 'none' keeps everything, 'full' recomputes everything.
# Only lists of what to save: a list of what *not* to save keeps gathered weights under sharding.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
    block: Callable[[Params, Tokens], Tokens],
    stacked: Params,
    x: Tokens,
    *,
    exits: tuple[int, ...],
    unroll: int,
    remat: str = "none",
) -> tuple[Tokens, Mapping[int, Tokens]]:
    """Applies `block(params_i, x)` for every slice i of `stacked`.

    Args:
      block: one transformer block, everything but its parameters and tokens closed over.
      stacked: parameters with a leading axis of the depth.
      x: tokens [b, n, d].
      exits: depths (1 = after the first block) whose tokens are returned.
      unroll: blocks per iteration of the scan; 1 compiles a single body, the depth writes out all.
      remat: a name of `REMAT`.

    Returns:
      The tokens after the last block, and {depth: tokens after that block} for `exits`.
    """
    depth = jax.tree.leaves(stacked)[0].shape[0]
    block = rematerialised(block, remat, looped=unroll < depth)
    if unroll >= depth:
        return _one_by_one(block, stacked, x, exits)
    depths = sorted(set(exits))
    slots = np.full(depth, len(depths), np.int32)
    slots[np.array(depths, int) - 1] = np.arange(len(depths))

    def body(carry, layer):
        tokens, buffer = carry
        params, slot = layer
        tokens = block(params, tokens)
        return (tokens, lax.dynamic_update_index_in_dim(buffer, tokens, slot, 0)), None

    if not depths:
        x, _ = lax.scan(lambda tokens, p: (block(p, tokens), None), x, stacked, unroll=unroll)
        return x, {}
    # Derived from x rather than a constant, so that it is sharded as x is.
    buffer = jnp.broadcast_to(0 * x, (len(depths) + 1, *x.shape))
    (x, buffer), _ = lax.scan(body, (x, buffer), (stacked, jnp.asarray(slots)), unroll=unroll)
    return x, {depth: buffer[k] for k, depth in enumerate(depths)}


def first_blocks(
    block: Callable[[Params, Tokens], Tokens],
    stacked: Params,
    x: Tokens,
    *,
    exits: tuple[int, ...],
    unroll: int,
) -> Mapping[int, Tokens]:
    """The tokens after the blocks `exits`, without computing any block behind the last of them.

    For passes without a gradient: that of the stack would be summed once a block.

    Args:
      block, stacked, x, unroll: see `run_blocks`.
      exits: depths (1 = after the first block), at least one.
    """
    left = {}

    def body(x: Tokens, i: jax.Array) -> tuple[Tokens, None]:
        # One block of the whole stack: slicing off the first blocks would copy them.
        return block(jax.tree.map(lambda leaf: leaf[i], stacked), x), None

    start = 0
    for depth in sorted(set(exits)):
        x, _ = lax.scan(body, x, jnp.arange(start, depth), unroll=min(unroll, depth - start))
        left[depth], start = x, depth
    return left


def _one_by_one(
    block: Callable[[Params, Tokens], Tokens], stacked: Params, x: Tokens, exits: tuple[int, ...]
) -> tuple[Tokens, Mapping[int, Tokens]]:
    """`run_blocks` without a loop: nothing is copied into a buffer at every block."""
    leaves, structure = jax.tree.flatten(stacked)
    # The gradient of `unstack` is one stack; that of x[i] would be a whole stack for every block.
    layers = zip(*(jnp.unstack(leaf) for leaf in leaves), strict=True)
    left = {}
    for depth, layer in enumerate(layers, 1):
        x = block(structure.unflatten(layer), x)
        if depth in exits:
            left[depth] = x
    return x, left
