"""Randomness is an address, not a state: the only place where keys are born.

Training draws from (seed, stream, step), sampling from (seed, sample index). Resuming, re-sharding
and re-batching therefore change nothing. Threefry is named, not left to the default: only with it
do per-sample draws stay the same in any batch and on any number of devices.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from ig_jax.types import Key


def key(seed: jax.Array | int, stream: str, step: jax.Array | int = 0) -> Key:
    """The key at (seed, stream, step); both may be traced."""
    root = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(fold_name(root, stream), step)


def fold_name(key: Key, name: str) -> Key:
    """The key of this name below another one, whose own draws stay what they are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def keys(seed: jax.Array | int, stream: str, indices: jax.Array) -> Key:
    """One key [b] per index [b]: that of 17 is the same in any batch."""
    root = key(seed, stream)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(indices)


def sample_keys(seed: jax.Array | int, indices: jax.Array) -> Key:
    """The keys [b] of samples with these indices [b]."""
    return keys(seed, "sample", indices)


# Addresses within one sample's own stream.
LATENTS, LABEL, FIRST_STEP = 0, 1, 2


def sample_normal(keys: Key, shape: tuple[int, ...], address: jax.Array | int) -> jax.Array:
    """Standard normal float32 [b, *shape], each row from its own key [b]."""

    def draw(k: Key) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(k, address), shape, dtype=jnp.float32)

    return jax.vmap(draw)(keys)


def sample_labels(keys: Key, num_classes: int) -> jax.Array:
    """Uniform random labels int32 [b], each from its own key [b]."""

    def draw(k: Key) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(k, LABEL), (), 0, num_classes)

    return jax.vmap(draw)(keys)
