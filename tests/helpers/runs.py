"""What runs left behind, compared."""

import json

import jax
import numpy as np


def assert_same_bits(a, b):
    """Two trees of arrays with equal structure and equal bits."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def metrics(workdir, without=frozenset()) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]
