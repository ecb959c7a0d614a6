"""The parameters of `kl_layers`: which there are, of what shape, and how to fill them from a file.

Sizes are read off the file's own shapes. A published convolution is OIHW and becomes HWIO; the
matrices of attention are (out, in) or (out, in, 1, 1) and become [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ig_jax import pytree

Shape = tuple[int, ...]
_State = Mapping[str, np.ndarray]

IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class Sizes:
    """An autoencoder; its decoder has one block more at every level than its encoder."""

    widths: tuple[int, ...]  # channels of each level, full resolution first
    blocks: int  # of the encoder at every level
    attention: frozenset[int]  # levels where attention follows every block
    latent_channels: int


def read_sizes(state: _State, block: str, attention: str | None = None) -> Sizes:
    """The sizes of a state dict.

    Args:
      block: regular expression for the start of the names of an encoder block; its groups are
        the level and the number of the block.
      attention: the same for an attention after a block, its group the level; None: there are none.

    Raises:
      ValueError: the state dict holds too little of an autoencoder to tell its sizes.
    """
    # Of these, the first axis is the width of the level; any one of them will do.
    tensor = re.compile(block + r"(?:conv1|conv2|norm2)\.(?:weight|bias)")
    blocks = {m: array for name, array in state.items() if (m := tensor.fullmatch(name))}
    widths = {int(m[1]): len(array) for m, array in blocks.items()}
    latents = [len(a) for n, a in state.items() if re.fullmatch(r"post_quant_conv\.\w+", n)]
    if not latents or sorted(widths) != list(range(len(widths))) or not widths:
        raise ValueError(
            f"no sizes to be read: needs 'post_quant_conv' and, for every level, '{tensor.pattern}'"
            f"; of these there are levels {sorted(widths)}; is it a file of another kind?"
        )
    attended = [re.match(attention, name) for name in state] if attention else []
    return Sizes(
        widths=tuple(widths[i] for i in range(len(widths))),
        blocks=1 + max(int(m[2]) for m in blocks),
        attention=frozenset(int(m[1]) for m in attended if m),
        latent_channels=latents[0],
    )


def _conv(inputs: int, outputs: int, window: int = 3) -> dict[str, Shape]:
    return {"kernel": (window, window, inputs, outputs), "bias": (outputs,)}


def _norm(width: int) -> dict[str, Shape]:
    return {"scale": (width,), "bias": (width,)}


def _attention(width: int) -> dict[str, Any]:
    matrices = {name: {"kernel": (width, width), "bias": (width,)} for name in ("q", "k", "v")}
    return {"norm": _norm(width), **matrices, "proj_out": matrices["q"]}


def _block(inputs: int, outputs: int) -> dict[str, Any]:
    shortcut = {} if inputs == outputs else {"shortcut": _conv(inputs, outputs, window=1)}
    convs = {"conv1": _conv(inputs, outputs), "conv2": _conv(outputs, outputs)}
    return {"norm1": _norm(inputs), "norm2": _norm(outputs), **convs, **shortcut}


def _level(inputs: int, outputs: int, blocks: int, *, attention: bool) -> dict[str, Any]:
    first = {"0": _block(inputs, outputs)}
    level = {"block": first | {str(i): _block(outputs, outputs) for i in range(1, blocks)}}
    attentions = {"attn": {str(i): _attention(outputs) for i in range(blocks)}}
    return level | (attentions if attention else {})


def _path(sizes: Sizes, order: list[int], blocks: int, resample: str) -> dict[str, Any]:
    """The levels in this order; all but the last end in a change of resolution."""
    levels, inputs = {}, sizes.widths[order[0]]
    for i, level in enumerate(order):
        width, attention = sizes.widths[level], level in sizes.attention
        levels[str(i)] = _level(inputs, width, blocks, attention=attention)
        if level != order[-1]:
            levels[str(i)][resample] = _conv(width, width)
        inputs = width
    return levels


def shapes(sizes: Sizes) -> dict[str, Any]:
    """The parameters of `kl_layers.encode` and `kl_layers.decode` as a nested dict of shapes."""
    first, last, latent = sizes.widths[0], sizes.widths[-1], sizes.latent_channels
    order = list(range(len(sizes.widths)))
    middle = {"block_1": _block(last, last), "attn_1": _attention(last)}
    middle["block_2"] = middle["block_1"]
    encoder = {
        "conv_in": _conv(IMAGE_CHANNELS, first),
        "down": _path(sizes, order, sizes.blocks, "downsample"),
        "mid": middle,
        "norm_out": _norm(last),
        "conv_out": _conv(last, 2 * latent),
    }
    decoder = {
        "conv_in": _conv(latent, last),
        "mid": middle,
        "up": _path(sizes, order[::-1], sizes.blocks + 1, "upsample"),
        "norm_out": _norm(first),
        "conv_out": _conv(first, IMAGE_CHANNELS),
    }
    quant, post_quant = _conv(2 * latent, 2 * latent, window=1), _conv(latent, latent, window=1)
    return {
        "encoder": encoder,
        "decoder": decoder,
        "quant_conv": quant,
        "post_quant_conv": post_quant,
    }


def rename(name: str, rules: list[tuple[str, str]]) -> str:
    """Every rule (regular expression, replacement) in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _laid_out(array: np.ndarray, rank: int) -> np.ndarray:
    if rank == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T


def fill_parameters(
    state: _State, sizes: Sizes, published: Callable[[str], tuple[str, ...]]
) -> dict[str, Any]:
    """The parameters of these sizes, as views of the arrays of a state dict.

    Args:
      published: our dotted name -> the names that it may have in the file, newest first.

    Raises:
      ValueError: lists every name that is missing, left over, or of another shape.
    """
    params, used, missing, misshapen = {}, set(), [], []
    for ours, shape in pytree.flatten(shapes(sizes)).items():
        names = published(ours)
        theirs = next((name for name in names if name in state), None)
        if theirs is None:
            missing.append(names[0])
            continue
        used.add(theirs)
        params[ours] = _laid_out(state[theirs], len(shape))
        if params[ours].shape != shape:
            misshapen.append(f"{theirs} {state[theirs].shape}")
    _refuse(missing=missing, left_over=sorted(set(state) - used), misshapen=misshapen)
    return pytree.unflatten(params)


def _refuse(**wrong: list[str]) -> None:
    faults = [
        f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in wrong.items() if names
    ]
    if faults:
        raise ValueError(f"the state dict is not that of this autoencoder; {'; '.join(faults)}")
