"""Detection of a published network from the names and shapes of its state dict.

Known: SiT (official, REPA's, SRA's, with Internal Guidance), DiT (official, SRA's), LightningDiT
with and without Internal Guidance. REPA's projectors, which only training needed, are left out;
SRA's head can train on. Left out, too, is the half of a SiT's or LightningDiT's output that its
sampler discards (`learn_sigma`).
DiT's second half, the learned variance, is kept.

Names and shapes leave some things open. Where a published network answers them, that is taken and
given; where two answer differently, the user is asked:

  direction of time   SiT: official from noise to data, the others, which descend from REPA, from
                      data to noise; these are known by names that the official one never has
  number of heads     given by norms of heads and by rotary tables; else that of the published size
  null class          the last row of the label table, unless num_classes counts it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ig_jax.codecs import to_uint8
from ig_jax.errors import UserError
from ig_jax.interop import parameter_names, published_file, time_direction
from ig_jax.interop.declared import DATA_TO_NOISE, NOISE_TO_DATA, UNDECLARED, Declared
from ig_jax.interop.published_file import LABELS, MODULATION, READOUT, File
from ig_jax.models import embed, lightningdit, sit

_State = Mapping[str, np.ndarray]

_HEADS = {
    (depth, width): heads
    for sizes in (sit.SIZES, lightningdit.SIZES)
    for depth, width, heads in sizes.values()
}
USUAL_CLASSES = 1000
_GATED = "blocks.0.mlp.w12.bias"

NO_NULL = (
    "no null class in the label table: one is added, of zeros and untrained, and CFG is off; "
    "training on with objective.label_drop above 0 trains it"
)

DIT_NOTE = (
    "DiT: predicts noise, kept with its learned variance, which the published ancestral steps of "
    "the config read"
)


class Detected(NamedTuple):
    """A network, its data, and its state dict in this code's terms."""

    model: dict[str, Any]  # the config section
    side: int  # of the latents
    channels: int
    classes: int
    state: dict[str, np.ndarray]
    # SRA's head, which trains on as that of the term `self_alignment`; empty without one.
    alignment_head: dict[str, np.ndarray]
    notes: list[str]  # what was found, assumed and done, a line each
    # With all that the file does not say, as it was given or taken.
    declared: Declared


def detect(state: _State, declared: Declared = UNDECLARED) -> Detected:
    """Finds out what `state` is.

    Args:
      state: published name -> array.
      given: what the file does not say, as far as it is given.

    Raises:
      UserError: it is no network known here, or more must be given, or what is given is wrong.
    """
    file = published_file.look(state, declared)
    notes = []
    left_out = file.training_only - ({"ap_head"} if file.alignment_head else set())
    if left_out:
        notes.append(f"left out, needed in training only: {', '.join(sorted(left_out))}")
    family = _family(file)
    direction, of_direction = _direction(file, family)
    heads, of_heads = _heads(file)
    classes, null_row, of_classes = _classes(file)
    process, path, prediction, of_process = _process(file, family)
    declared = dataclasses.replace(
        declared,
        family=family,
        num_heads=heads,
        readout_depth=_readout(file),
        time_direction=direction,
        num_classes=classes,
        process=process,
        path=path,
        prediction=prediction,
        time_scale=declared.time_scale or 1.0,
        mlp_ratio=_mlp_ratio(file),
        label_drop=declared.label_drop if null_row else 0.0,
        rounding=declared.rounding or _rounding(file, family, direction),
    )
    kept = dict(file.state)
    if family == "dit":
        notes += [DIT_NOTE] if process == "ddpm" else []
    else:
        halved = _without_sigma(file)
        notes += ["learned sigma dropped, as published samplers do"] if halved else []
        kept |= halved
    kept |= time_direction.folded(kept, family, direction, prediction)
    if not null_row:
        kept[LABELS] = np.concatenate([kept[LABELS], np.zeros_like(kept[LABELS][:1])])
    notes += [of_direction, of_heads, of_classes, of_process, _table(file)]
    return Detected(
        model=_model(file, declared),
        side=file.patch * file.tokens,
        channels=file.channels,
        classes=classes,
        state=kept,
        alignment_head=dict(file.alignment_head),
        notes=[note for note in notes if note],
        declared=declared,
    )


def _family(file: File) -> str:
    """The family's name in `models`. Of the SRA networks only the DiT learns a variance."""
    declared, state = file.declared.family, file.state
    marks = ("mlp.w12.weight", "norm1.weight")
    lightningdit_alone = (
        any(f"blocks.0.{name}" in state for name in marks)
        or parameter_names.DERIVED[0] in state
        or len(state[MODULATION]) == 4 * file.width
        or ("blocks.0.attn.q_norm.weight" in state and "blocks.0.attn.q_norm.bias" not in state)
    )
    if lightningdit_alone:
        possible = ("lightningdit",)
    elif not file.with_sigma:
        possible = ("sit", "lightningdit")
    elif "ap_head" in file.training_only:
        possible = ("dit",)
    else:
        possible = ("sit", "dit", "lightningdit")
    if declared is None and len(possible) == 3:
        raise UserError(
            "official SiT and DiT checkpoints have the same names and shapes: say --family=sit or "
            "--family=dit"
        )
    if declared == "dit" and not file.with_sigma:
        raise UserError(
            f"{file.declared.say('family')}: the checkpoint learned no variance "
            "(learn_sigma=False), and a DiT without it is not built"
        )
    if declared not in (None, *possible):
        raise UserError(
            f"{file.declared.say('family')}: the checkpoint is a {possible[0]} by its names and "
            "shapes"
        )
    return declared or possible[0]


def _direction(file: File, family: str) -> tuple[str, str]:
    """From what t = 0 is to what t = 1 is, and a remark."""
    declared = file.declared.time_direction
    if family == "dit":
        if declared == NOISE_TO_DATA:
            raise UserError(
                f"{file.declared.say('time_direction')}: a DiT counts from data to noise"
            )
        return DATA_TO_NOISE, ""
    if declared:
        return declared, _of_direction(family, declared, "as given")
    if family == "lightningdit":
        return NOISE_TO_DATA, ""
    marks = sorted(file.training_only) + ["final_layer_xr"] * file.has_readout
    if file.with_sigma and not marks:
        return NOISE_TO_DATA, _of_direction(family, NOISE_TO_DATA, "as the official SiT's")
    marks += ["q_norm"] * ("blocks.0.attn.q_norm.weight" in file.state)
    if marks and not file.with_sigma:
        why = f"as in the code of REPA, SRA and IG, whose SiTs alone have {', '.join(marks)}"
        return DATA_TO_NOISE, _of_direction(family, DATA_TO_NOISE, why)
    raise UserError(
        "the checkpoint does not say in which direction its time runs: say "
        f"--time_direction={NOISE_TO_DATA} (the official SiT's code: t = 0 is noise) or "
        f"--time_direction={DATA_TO_NOISE} (REPA's, SRA's, IG's and this code: t = 0 is data)"
    )


def _of_direction(family: str, direction: str, why: str) -> str:
    turned = direction != time_direction.OWN[family]
    done = "; turned round, exactly" if turned else ""
    return f"time runs from {direction.replace('_', ' ')} in the file, {why}{done}"


def _heads(file: File) -> tuple[int, str]:
    """Returns the number of heads, and a remark."""
    implied = {}
    for name in ("blocks.0.attn.q_norm.weight", *parameter_names.DERIVED):
        if name in file.state:
            implied[name] = file.width / file.state[name].shape[-1]
    declared, width = file.declared.num_heads, file.width
    heads = {*implied.values(), *([declared] if declared else [])}
    if len(heads) > 1 or any(n % 1 or width % n for n in heads):
        said = [f"{name} says {n:g}" for name, n in implied.items()]
        said += [file.declared.say("num_heads")] if declared else []
        raise UserError(
            f"number of heads: {', '.join(said)}; for a width of {width} it must be one number "
            "that divides it"
        )
    if heads:
        number = int(heads.pop())
        _check_rotary(file, number)
        return number, ""
    if (file.depth, width) in _HEADS:
        number = _HEADS[file.depth, width]
        return number, (
            f"{number} heads, as the published network of depth {file.depth} and width {width}: "
            "the file does not say; --num_heads says otherwise"
        )
    raise UserError(
        f"the checkpoint does not say how many heads it has, and no published network has width "
        f"{width} and depth {file.depth}: say --num_heads"
    )


def _check_rotary(file: File, heads: int) -> None:
    """The tables of the file must be those that this code computes."""
    if parameter_names.DERIVED[0] not in file.state:
        return
    tables = parameter_names.rotary_tables(file.tokens, file.width // heads)
    for name, table in tables.items():
        array = np.asarray(file.state[name], np.float32)
        # As far as bfloat16 may round them.
        if array.shape != table.shape or not np.abs(array - table).max() <= 1e-2:
            raise UserError(
                f"the checkpoint's {name!r} is not the table of {file.tokens} x {file.tokens} "
                "tokens with base 10000, the only one that is built"
            )


def _classes(file: File) -> tuple[int, bool, str]:
    """Classes, whether there is a null class beside them, and a remark."""
    rows, declared = len(file.state[LABELS]), file.declared.num_classes
    if declared:
        if declared not in (rows, rows - 1):
            raise UserError(
                f"{file.declared.say('num_classes')}: the label table has {rows} rows, which are "
                f"{rows - 1} classes and the null class, or {rows} classes without one"
            )
        return declared, declared < rows, "" if declared < rows else NO_NULL
    if rows == USUAL_CLASSES:
        raise UserError(
            f"the checkpoint's label table has {rows} rows: say --num_classes={rows} if all are "
            f"classes, none the null class (class_dropout_prob = 0), else --num_classes={rows - 1}"
        )
    if rows == 1:
        return 1, False, NO_NULL
    return (
        rows - 1,
        True,
        (
            f"label table of {rows} rows, taken for {rows - 1} classes and the null class: the "
            "file does not say; if it was trained without one (class_dropout_prob = 0), give "
            f"--num_classes={rows}"
        ),
    )


def _process(file: File, family: str) -> tuple[str, str | None, str | None, str]:
    """The process and, if it is a flow, its path and what is predicted; and a remark."""
    declared = file.declared
    process = declared.process or ("ddpm" if family == "dit" else "flow")
    if process != "flow":
        stated = [declared.say(field) for field in ("path", "prediction") if declared[field]]
        if stated:
            raise UserError(f"{' and '.join(stated)}: a {process} process has no such choice")
        return process, None, None, ""
    path, prediction = declared.path or "linear", declared.prediction or "velocity"
    note = f"{path} path, predicts the {prediction}"
    assumed = [f"--{field}" for field in ("path", "prediction") if not declared[field]]
    if assumed:
        note += f"; as published, the file does not say: {' and '.join(assumed)} can say otherwise"
    return process, path, prediction, note


def _readout(file: File) -> int | None:
    depth = file.declared.readout_depth
    if file.has_readout and not depth:
        raise UserError(
            "the checkpoint has an intermediate head but does not say where it reads: give "
            "--readout_depth (published: 8 for L and XL, 4 for B)"
        )
    if depth and not file.has_readout:
        raise UserError(
            f"{file.declared.say('readout_depth')}: the checkpoint has no intermediate head"
        )
    return depth


def _rounding(file: File, family: str, direction: str) -> str:
    """From decoded images to 8 bits as the published samplers of this network do."""
    of_repa = family == "sit" and direction == DATA_TO_NOISE
    return to_uint8.TRUNCATED if of_repa or "ap_head" in file.training_only else to_uint8.ROUNDED


def _model(file: File, declared: Declared) -> dict[str, Any]:
    state = file.state
    model = {
        "name": declared.family,
        "depth": file.depth,
        "hidden_size": file.width,
        "num_heads": declared.num_heads,
        "patch_size": file.patch,
        "mlp_ratio": declared.mlp_ratio,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "readouts": (declared.readout_depth,) if declared.readout_depth else (),
        "time_scale": declared.time_scale,
        "dtype": "float32",
        "remat": "none",
        "unroll": 1,
    }
    if declared.self_conditioning:
        model["self_conditioning"] = dict(declared.self_conditioning)
    if declared.family == "lightningdit":
        model |= {
            "swiglu": _GATED in state,
            "rope": parameter_names.DERIVED[0] in state,
            "rms_norm": "blocks.0.norm1.weight" in state,
            "shift": len(state[MODULATION]) == 6 * file.width,
        }
    return model


def _mlp_ratio(file: File) -> float:
    """A ratio that makes an MLP of the width in the file, published ones first."""
    gated = _GATED in file.state
    rows = len(file.state[_GATED if gated else "blocks.0.mlp.fc1.bias"])

    def rows_of(ratio: float) -> int:
        hidden = file.width * ratio
        return 2 * int(2 / 3 * hidden) if gated else int(hidden)

    wide = rows / 2 * 1.5 if gated else rows
    guesses = (file.declared.mlp_ratio, 4.0, wide / file.width, (wide + 0.5) / file.width)
    return next((float(r) for r in guesses if r and rows_of(r) == rows), 4.0)


def _table(file: File) -> str:
    """Compares the fixed position table with a fresh one; the published Muon shrinks it."""
    size = np.linalg.norm(np.asarray(file.state["pos_embed"], np.float32))
    if file.width % 4:
        return ""
    fresh = np.linalg.norm(embed.position_table(file.tokens, file.width))
    return f"position table: norm {size:.4g}, {size / fresh:.4f} of a fresh one; used as it is"


def _without_sigma(file: File) -> dict[str, np.ndarray]:
    """The final linear layers that give two values a channel, with the first alone."""

    def half(array: np.ndarray) -> np.ndarray:
        p = file.patch
        rows = array.reshape(p, p, 2 * file.channels, -1)[:, :, : file.channels]
        return rows.reshape(p**2 * file.channels, *array.shape[1:])

    heads = ["final_layer", *([READOUT] if file.has_readout else [])]
    layers = [f"{head}.linear.{kind}" for head in heads for kind in ("weight", "bias")]
    return {n: half(file.state[n]) for n in layers if file.values(n.split(".")[0]) == 2}
