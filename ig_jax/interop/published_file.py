"""A published state dict looked at: whether all layers are there, and shaped as layers are.

Nothing is indexed by name or shape before this has said that it is there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from ig_jax.errors import UserError, shown
from ig_jax.interop import parameter_names
from ig_jax.interop.declared import ONLY, Declared
from ig_jax.interop.time_direction import TIME_LAYER
from ig_jax.models import embed

LABELS = "y_embedder.embedding_table.weight"
MODULATION, READOUT = "blocks.0.adaLN_modulation.1.bias", "final_layer_xr"
TRAINING_ONLY = ("ap_head.", "projectors.")
HEAD_LAYERS = ("ap_head.linear1", "ap_head.linear2")  # SRA's, D -> 2D -> D
_BLOCK = re.compile(r"blocks\.(\d{1,6})\.(.+)")
_SHOWN = 12


def _linear(*layers: str) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def _head(name: str) -> list[str]:
    return _linear(f"{name}.linear", f"{name}.adaLN_modulation.1")


SHELL = [
    "pos_embed",
    *_linear("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"),
    LABELS,
    *_head("final_layer"),
]
# Of a block; what only some networks have is expected of all blocks where one has it.
INNER = _linear("attn.qkv", "attn.proj", "adaLN_modulation.1")
_GATED, PLAIN = _linear("mlp.w12", "mlp.w3"), _linear("mlp.fc1", "mlp.fc2")
HEAD_NORMS = _linear("attn.q_norm", "attn.k_norm")  # LayerNorms; RMSNorms have no bias
SELF_CONDITIONING = ("self_conditioning.project", "self_conditioning.scale")  # of exports alone
NORMS = ["norm1.weight", "norm2.weight"]  # RMSNorms, which the heads then have too
FINAL_NORMS = ["final_layer.norm_final.weight", "final_layer_xr.norm_final.weight"]


@dataclass(frozen=True)
class File:
    """A state dict whose layers are all there."""

    state: Mapping[str, np.ndarray]  # without what only training needs
    training_only: frozenset[str]  # the first components of that
    alignment_head: Mapping[str, np.ndarray]  # SRA's, if the file holds one; else empty
    declared: Declared
    depth: int
    width: int
    channels: int
    patch: int

    def values(self, head: str) -> float:
        """Number of values that this head gives for each channel."""
        return len(self.state[f"{head}.linear.bias"]) / (self.patch**2 * self.channels)

    @property
    def with_sigma(self) -> bool:
        return self.values("final_layer") == 2

    @property
    def has_readout(self) -> bool:
        return "final_layer_xr.linear.weight" in self.state

    @property
    def tokens(self) -> int:
        """Along a side."""
        return math.isqrt(self.state["pos_embed"].shape[1])


def look(state: Mapping[str, np.ndarray], declared: Declared) -> File:
    """The file, if all its layers are there and have the shapes of layers.

    Raises:
      UserError: something is missing, left over, of another shape or type; or a file that only
        this code reads has lost its metadata.
    """
    only = sorted(name for name in state if name.startswith((ONLY, *SELF_CONDITIONING)))
    if only and not declared.described:
        raise UserError(
            f"the checkpoint was exported with {', '.join(only[:5])}, which no published network "
            "has, and has lost the metadata beside it; import the exported file as it was"
        )
    kept = {n: a for n, a in state.items() if not n.startswith((ONLY, *TRAINING_ONLY))}
    training_only = frozenset(n.split(".")[0] for n in state if n.startswith(TRAINING_ONLY))
    depth = _depth(kept)
    for name, array in kept.items():
        bias = kept.get(name.replace(".weight", ".bias"))
        if (
            array.ndim != _rank(name)
            or not array.size
            or (bias is not None and bias.shape[:1] != array.shape[:1])
        ):
            raise UserError(
                f"the checkpoint's {name!r} has shape {array.shape}, which is none of its layer"
            )
        if array.dtype.kind in "biuc":
            raise UserError(
                f"the checkpoint's {name!r} is of type {array.dtype}: quantised weights are not "
                "read; take the original ones"
            )
    width, channels, patch, across = kept["x_embedder.proj.weight"].shape
    head = _alignment_head(state, width)
    file = File(kept, training_only, head, declared, depth, width, channels, patch)
    one, tokens, wide = kept["pos_embed"].shape
    time_features = kept[TIME_LAYER].shape[1]
    rules = [
        ("x_embedder.proj.weight", patch == across),
        ("pos_embed", one == 1 and tokens == file.tokens**2 and wide == width),
        (LABELS, kept[LABELS].shape[1] == width),
        (TIME_LAYER, time_features == embed.NUM_TIME_FEATURES),
        ("final_layer.linear.bias", file.values("final_layer") in (1, 2)),
        ("final_layer_xr.linear.bias", not file.has_readout or file.values(READOUT) in (1, 2)),
        ("blocks.0.adaLN_modulation.1.bias", len(kept[MODULATION]) in (4 * width, 6 * width)),
    ]
    for name, holds in rules:
        if not holds:
            raise UserError(
                f"the checkpoint's {name!r} has shape {kept[name].shape}, which no SiT, DiT or "
                f"LightningDiT of width {width}, {channels} channels and patch {patch} has"
            )
    return file


def _alignment_head(state: Mapping[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
    """SRA's head, if all of it is there in the published shapes; otherwise empty."""
    names = _linear(*HEAD_LAYERS)
    shapes = [(2 * width, width), (2 * width,), (width, 2 * width), (width,)]
    head = {name: state[name] for name in names if name in state}
    whole = [array.shape for array in head.values()] == shapes
    return head if whole and all(a.dtype.kind not in "biuc" for a in head.values()) else {}


def _rank(name: str) -> int:
    """Axes of the array of this name."""
    known = {"x_embedder.proj.weight": 4, "pos_embed": 3}
    vector = name.endswith(
        (".bias", "norm.weight", "norm1.weight", "norm2.weight", "norm_final.weight")
    )
    return known.get(name, 1 if vector else 2)


def _depth(state: Collection[str]) -> int:
    """The depth of the network whose names these are, without those of training alone.

    Raises:
      UserError: it lacks layers, or has unknown ones; all are listed.
    """
    inner: dict[int, set[str]] = {}
    for name in state:
        if match := _BLOCK.fullmatch(name):
            inner.setdefault(int(match[1]), set()).add(match[2])
    absent = [name for name in SHELL if name not in state]
    if 2 * len(absent) > len(SHELL) or not inner:
        raise UserError(
            "the checkpoint is no SiT, DiT or LightningDiT: it lacks "
            f"{_listed(absent or ['blocks'])}, and holds {_listed(sorted(state))}"
        )
    if len(inner) <= max(inner):
        gaps = [f"blocks.{i}" for i in range(len(inner)) if i not in inner]
        raise UserError(f"the checkpoint lacks whole blocks: {_listed(gaps)}; copy it again")
    expected = _expected(state, inner)
    _refuse([n for n in expected if n not in state], sorted(set(state) - set(expected)))
    return len(inner)


def _expected(state: Collection[str], inner: dict[int, set[str]]) -> dict[str, None]:
    """The names that a network has which has any of the choices that this one has."""
    seen = set().union(*inner.values())
    of_block = INNER + (_GATED if seen & set(_GATED) else PLAIN)
    of_block += [name for name in HEAD_NORMS if name in seen or _twin(name) in seen]
    expected = list(SHELL)
    if any(name.startswith("final_layer_xr.") for name in state):
        expected += _head("final_layer_xr")
    for layer in SELF_CONDITIONING:
        if any(name.startswith(f"{layer}.") for name in state):
            expected += _linear(layer)
    if seen & set(NORMS) or any(name in state for name in FINAL_NORMS):
        of_block += NORMS
        expected += [n for n in FINAL_NORMS if n.replace("norm_final", "linear") in expected]
    if any(name in state for name in parameter_names.DERIVED):
        expected += parameter_names.DERIVED
    expected += [f"blocks.{i}.{name}" for i in sorted(inner) for name in of_block]
    return dict.fromkeys(expected)


def _twin(name: str) -> str:
    """The norm of queries for that of keys, and back."""
    return re.sub(r"([qk])_norm", lambda n: f"{'k' if n[1] == 'q' else 'q'}_norm", name)


def _refuse(absent: list[str], unknown: list[str]) -> None:
    declared = [f"the checkpoint lacks {_listed(absent)}"] if absent else []
    if unknown:
        declared.append(f"the checkpoint holds names that this network lacks: {_listed(unknown)}")
    if declared:
        raise UserError("; ".join(declared))


def _listed(listed: list[str]) -> str:
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(map(shown, listed[:_SHOWN])) + more
