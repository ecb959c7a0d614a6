"""Leaves of nested dicts by name: paths, sizes, differences between nested settings."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from ig_jax.errors import shown


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': x}} -> {'a.b': x}, in the tree's own order."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, for trees with string keys."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`fn(dotted path, leaf, *leaves of rest)` on every leaf of any pytree, keeping its structure.

    Holes that optax leaves in a tree stay.
    """

    def named(path: tuple, *leaves: Any) -> Any:
        return fn(jax.tree_util.keystr(path, simple=True, separator="."), *leaves)

    return jax.tree.map_with_path(named, tree, *rest)


def is_stack(path: str) -> bool:
    """Returns whether the leaf of this dotted name holds one array a block, [depth, ...]."""
    return "blocks" in path.split(".")


def count(tree: Any) -> int:
    """Number of array entries."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays, also of abstract ones."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and values of all arrays: whether two networks are one."""
    found = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        found.update(f"{path} {array.dtype} {array.shape} ".encode())
        found.update(array.data if array.size else b"")
    return found.hexdigest()


def cut(tree: Any, parts: int) -> Any:
    """[b, ...] -> [parts, b / parts, ...], every part taking rows from every device."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def joined(tree: Any) -> Any:
    """The inverse of `cut`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line 'field: old value here, new value there' per leaf that differs."""
    a, b = flatten(old), flatten(new)
    absent = "(absent)"
    return [
        f"{path}: {shown(a.get(path, absent))} there, {shown(b.get(path, absent))} here"
        for path in dict.fromkeys([*a, *b])
        if a.get(path, absent) != b.get(path, absent)
    ]
