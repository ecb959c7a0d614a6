"""What a published state dict is, from its names and shapes alone, turned into our terms.

Known: SiT (official, with learned sigma), SiT + Internal Guidance, REPA SiT, SRA SiT, DiT (official
and SRA), LightningDiT with and without Internal Guidance. What only training needed (projectors,
SRA's head) is dropped, and so is the half of the official SiT's output that its sampler discards.
DiT's second half, the learned variance, is kept.

The official SiT counts time from noise to data: v(x, t) = -v_official(x, 1 - t). That is folded
into two layers, exactly: with cos(f (1 - t)) and sin(f (1 - t)) expanded, the first time layer's
columns become Wc cos f + Ws sin f and Wc sin f - Ws cos f, and the final layer changes its sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ig_jax.errors import UserError
from ig_jax.models import embed, lightningdit, sit

State = Mapping[str, np.ndarray]

TRAINING_ONLY = ("ap_head.", "projectors.")
HEADS = {
    width: heads for sizes in (sit.SIZES, lightningdit.SIZES) for _, width, heads in sizes.values()
}

DIT_NOTE = (
    "DiT: predicts noise, kept with its learned variance. The config samples it along the ODE; the "
    "published ancestral steps, which use the variance, are not built"
)


class Recognised(NamedTuple):
    """A network, its data, and its state dict in this code's terms."""

    model: dict[str, Any]  # the config section
    side: int  # of the latents
    channels: int
    classes: int
    state: dict[str, np.ndarray]
    notes: list[str]  # what was found and done, a line each


def recognise(state: State, readout_depth: int = 0, family: str = "") -> Recognised:
    """Finds out what `state` is.

    Args:
      state: published name -> array.
      readout_depth: where the intermediate head reads; the file does not say. 0: not told.
      family: sit or dit, which the official files of both do not tell apart. '': not told.

    Raises:
      UserError: it is no network known here, or more must be told, or what is told is wrong.
    """
    for name in ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"):
        if name not in state:
            raise UserError(f"the checkpoint lacks {name!r}: it is no SiT, DiT or LightningDiT")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    kept = {n: a for n, a in state.items() if not n.startswith(TRAINING_ONLY)}
    dropped = sorted({n.split(".")[0] for n in state if n not in kept})
    notes = [f"left out, needed in training only: {', '.join(dropped)}"] if dropped else []
    with_sigma = len(state["final_layer.linear.bias"]) == 2 * patch**2 * channels
    name = _family(state, with_sigma, family)
    is_dit, is_lightningdit = name == "dit", name == "lightningdit"
    if is_dit:
        notes.append(DIT_NOTE)
    elif with_sigma:
        kept |= _without_sigma(kept, patch, channels)
        kept |= _turned_round(kept)
        notes.append("official SiT: learned sigma dropped, direction of time turned round")
    gated = "blocks.0.mlp.w12.weight" in state
    model = {
        "name": name,
        "depth": len({n.split(".")[1] for n in state if n.startswith("blocks.")}),
        "hidden_size": width,
        "num_heads": _heads(state, width),
        "patch_size": patch,
        "mlp_ratio": 4.0 if gated else len(state["blocks.0.mlp.fc1.bias"]) / width,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "readouts": _readouts(state, readout_depth),
        "time_scale": 1.0,
        "dtype": "float32",
        "remat": "none",
        "unroll": 1,
    }
    if is_lightningdit:
        model |= {
            "swiglu": gated,
            "rope": "feat_rope.freqs_cos" in state,
            "rms_norm": "blocks.0.norm1.weight" in state,
            "shift": len(state["blocks.0.adaLN_modulation.1.bias"]) == 6 * width,
        }
    side = patch * math.isqrt(state["pos_embed"].shape[1])
    classes = len(state["y_embedder.embedding_table.weight"]) - 1
    return Recognised(
        model=model,
        side=side,
        channels=channels,
        classes=classes,
        state=kept,
        notes=notes + [_table(state, side, patch)],
    )


def _family(state: State, with_sigma: bool, told: str) -> str:
    """The family's name in `models`. Of the SRA networks only the DiT learns a variance."""
    if any(f"blocks.0.{name}.weight" in state for name in ("mlp.w12", "norm1")):
        found = "lightningdit"
    elif not with_sigma:
        found = "sit"
    elif "ap_head.linear1.weight" in state:
        found = "dit"
    elif told:
        found = told
    else:
        raise UserError(
            "official SiT and DiT checkpoints have the same names and shapes: say --family=sit or "
            "--family=dit"
        )
    if told not in ("", found):
        raise UserError(f"--family={told}: the checkpoint is a {found} by its names and shapes")
    return found


def _heads(state: State, width: int) -> int:
    for name in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos"):
        if name in state:
            return width // state[name].shape[-1]
    if width not in HEADS:
        raise UserError(
            f"the checkpoint's width is {width}, which no published size has (known: "
            f"{', '.join(map(str, sorted(HEADS)))}): its number of heads cannot be told"
        )
    return HEADS[width]


def _readouts(state: State, depth: int) -> tuple[int, ...]:
    has_readout = "final_layer_xr.linear.weight" in state
    if has_readout and not depth:
        raise UserError(
            "the checkpoint has an intermediate head but does not say where it reads: give "
            "--readout_depth (published: 8 for L and XL, 4 for B)"
        )
    if depth and not has_readout:
        raise UserError(f"--readout_depth={depth}: the checkpoint has no intermediate head")
    return (depth,) if has_readout else ()


def _table(state: State, side: int, patch: int) -> str:
    """How the fixed position table compares with a fresh one; the published Muon shrinks it."""
    found = np.linalg.norm(state["pos_embed"])
    fresh = np.linalg.norm(embed.position_table(side // patch, state["pos_embed"].shape[-1]))
    return f"position table: norm {found:.4g}, {found / fresh:.4f} of a fresh one; used as it is"


def _without_sigma(state: State, patch: int, channels: int) -> dict[str, np.ndarray]:
    """The final linear layer with the first half of its output channels."""

    def half(array: np.ndarray) -> np.ndarray:
        rows = array.reshape(patch, patch, 2 * channels, -1)[:, :, :channels]
        return rows.reshape(patch**2 * channels, *array.shape[1:])

    return {n: half(state[n]) for n in ("final_layer.linear.weight", "final_layer.linear.bias")}


def _turned_round(state: State) -> dict[str, np.ndarray]:
    """The layers that change with the direction of time."""
    name = "t_embedder.mlp.0.weight"
    half = embed.TIME_FEATURES // 2
    cos_columns, sin_columns = np.split(np.asarray(state[name], np.float64), 2, axis=1)
    frequencies = embed.MAX_PERIOD ** (-np.arange(half) / half)
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    columns = [cos_columns * cos + sin_columns * sin, cos_columns * sin - sin_columns * cos]
    final = ("final_layer.linear.weight", "final_layer.linear.bias")
    turned = {name: np.concatenate(columns, axis=1).astype(np.float32)}
    return turned | {n: -np.asarray(state[n]) for n in final}
