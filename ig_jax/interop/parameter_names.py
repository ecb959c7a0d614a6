"""Our parameter names and layouts against the state dicts of the published PyTorch models.

Rules that all of them share: a Linear weight is (out, in) there and (in, out) here; a convolution
OIHW there and HWIO here; blocks are numbered there and stacked along a leading axis here; the
packed q, k, v rows are (3, heads, head_dim), which here are axes of their own; so are the two maps
of a gated MLP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ig_jax import pytree
from ig_jax.models import layers
from ig_jax.optim.train_state import HEADS_OF_TERMS


@dataclass(frozen=True)
class Rule:
    """One kind of leaf: our name, theirs, and how to lay theirs out as ours and back."""

    ours: str  # regular expression over our dotted name, without 'blocks.'
    theirs: str  # their name; may use the groups of `ours`
    # Theirs, our shape -> ours.
    layout: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    inverse: Callable[[str, np.ndarray], np.ndarray]  # our name, ours -> theirs


def _same(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape)


def _flat(name: str, array: np.ndarray) -> np.ndarray:
    """Tables keep their axes; biases and scales of heads and gates become vectors."""
    return array if name.endswith(("pos_embed", "embedding")) else array.reshape(-1)


def _linear(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.T.reshape(shape)


def _linear_back(name: str, array: np.ndarray) -> np.ndarray:
    inputs = 2 if name.endswith("attn.proj.kernel") else 1  # (heads, head_dim) are its inputs
    return array.reshape(int(np.prod(array.shape[:inputs])), -1).T


def _convolution(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.transpose(2, 3, 1, 0).reshape(shape)


def _convolution_back(name: str, array: np.ndarray) -> np.ndarray:
    return array.transpose(3, 2, 0, 1)


def _pair(ours: str, theirs: str) -> list[Rule]:
    """The rules for a Linear's kernel and bias."""
    return [
        Rule(rf"{ours}\.kernel", f"{theirs}.weight", _linear, _linear_back),
        Rule(rf"{ours}\.bias", f"{theirs}.bias", _same, _flat),
    ]


_ALIGNMENT_HEAD = f"{HEADS_OF_TERMS}.self_alignment"

BLOCK_RULES = [
    *_pair(r"attn\.(qkv|proj)", r"attn.\1"),
    Rule(r"attn\.(q_norm|k_norm)\.scale", r"attn.\1.weight", _same, _flat),
    Rule(r"attn\.(q_norm|k_norm)\.bias", r"attn.\1.bias", _same, _flat),
    *_pair(r"mlp\.(fc1|fc2|w12|w3)", r"mlp.\1"),
    Rule(r"(norm1|norm2)\.scale", r"\1.weight", _same, _flat),
    *_pair(r"modulation", "adaLN_modulation.1"),
]

SHELL_RULES = [
    Rule(r"pos_embed", "pos_embed", _same, _flat),
    Rule(r"x_embedder\.proj\.kernel", "x_embedder.proj.weight", _convolution, _convolution_back),
    Rule(r"x_embedder\.proj\.bias", "x_embedder.proj.bias", _same, _flat),
    *_pair(r"t_embedder\.fc1", "t_embedder.mlp.0"),
    *_pair(r"t_embedder\.fc2", "t_embedder.mlp.2"),
    Rule(r"y_embedder\.table\.embedding", "y_embedder.embedding_table.weight", _same, _flat),
    # The published models have one readout, and do not say at which depth.
    *_pair(r"heads\.depth_\d+\.linear", "final_layer_xr.linear"),
    *_pair(r"heads\.depth_\d+\.modulation", "final_layer_xr.adaLN_modulation.1"),
    Rule(r"heads\.depth_\d+\.norm\.scale", "final_layer_xr.norm_final.weight", _same, _flat),
    Rule(r"final_layer\.norm\.scale", "final_layer.norm_final.weight", _same, _flat),
    *_pair(r"final_layer\.linear", "final_layer.linear"),
    *_pair(r"final_layer\.modulation", "final_layer.adaLN_modulation.1"),
    # No published network has it; these are names of its own.
    *_pair(r"self_conditioning\.(project|scale)", r"self_conditioning.\1"),
    # The head that SRA trains beside the network.
    *_pair(rf"{_ALIGNMENT_HEAD}\.fc([12])", r"ap_head.linear\1"),
]


# Tables that LightningDiT's files carry although they follow from the sizes.
DERIVED = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def rotary_tables(side: int, head_dim: int) -> dict[str, np.ndarray]:
    """The derived tables of a network on side x side tokens, float32 [side**2, head_dim]."""
    angles = layers.rotation_angles(side, head_dim).repeat(2, axis=1)
    tables = (np.cos(angles), np.sin(angles))
    return {name: table.astype(np.float32) for name, table in zip(DERIVED, tables, strict=True)}


def _find(rules: Iterable[Rule], name: str) -> tuple[str, Rule]:
    for rule in rules:
        match = re.fullmatch(rule.ours, name)
        if match:
            return match.expand(rule.theirs), rule
    raise ValueError(f"parameter {name!r} has no published counterpart: add a rule to names.py")


def from_published(state: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters from a published state dict.

    Args:
      state: published name -> array.
      like: our parameters, possibly abstract: names and shapes to fill.

    Raises:
      ValueError: names are missing, left over, or have the wrong number of values; all are listed.
    """
    used: set[str] = set(DERIVED)
    problems: list[str] = []

    def take(prefix: str, name: str, rules: list[Rule], shape: tuple[int, ...]) -> np.ndarray:
        theirs, rule = _find(rules, name)
        theirs, size = prefix + theirs, int(np.prod(shape))
        used.add(theirs)
        if theirs not in state:
            problems.append(f"lacks {theirs!r}")
        elif np.size(state[theirs]) != size:
            array = np.asarray(state[theirs])
            problems.append(
                f"{theirs!r} has {array.size} values, shape {array.shape}; this model's settings "
                f"ask for {size}"
            )
        else:
            return rule.layout(np.asarray(state[theirs]), shape)
        return np.zeros(shape, np.float32)

    def fill(path: str, leaf: Any) -> np.ndarray:
        kind, _, name = path.partition(".")
        if kind != "blocks":
            return take("", path, SHELL_RULES, leaf.shape)
        depth, *shape = leaf.shape
        return np.stack(
            [take(f"blocks.{i}.", name, BLOCK_RULES, tuple(shape)) for i in range(depth)]
        )

    params = pytree.map_named(fill, like)
    left = sorted(set(state) - used)
    if left:
        problems.append(f"holds names this model lacks: {', '.join(left)}")
    if problems:
        raise ValueError(f"the state dict {'; the state dict '.join(problems)}")
    return params


def to_published(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The published state dict of our parameters: contiguous arrays under published names.

    The inverse of `from_published`, without the tables that follow from the sizes.
    """

    def give(prefix: str, name: str, rules: list[Rule], leaf: np.ndarray) -> None:
        theirs, rule = _find(rules, name)
        # safetensors writes wrong data for arrays that are not contiguous, without a word.
        state[prefix + theirs] = np.ascontiguousarray(rule.inverse(name, leaf))

    state: dict[str, np.ndarray] = {}
    for path, leaf in pytree.flatten(params).items():
        kind, _, name = path.partition(".")
        if kind != "blocks":
            give("", path, SHELL_RULES, np.asarray(leaf))
            continue
        for i, one in enumerate(np.asarray(leaf)):
            give(f"blocks.{i}.", name, BLOCK_RULES, one)
    return state
