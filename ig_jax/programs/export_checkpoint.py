"""--mode=export: a run's network as safetensors under the published names, with its model card.

The file counts time as the published code of its family does, and its header says all that
--mode=import needs. Of an imported network that was not trained on, it is the published file again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ig_jax import experiment, pytree
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.codecs import CODECS, to_uint8
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.interop import model_card, original, parameter_names, time_direction
from ig_jax.interop.declared import ONLY, Declared, to_metadata
from ig_jax.interop.model_card import Export
from ig_jax.interop.original import Original
from ig_jax.interop.published_file import LABELS
from ig_jax.io import files, state_dict
from ig_jax.models.transformer import TransformerSettings
from ig_jax.monitoring import console
from ig_jax.optim.train_state import HEADS_OF_TERMS
from ig_jax.types import Params

SELF_ALIGNMENT = "self_alignment"  # the term whose head published networks carry


class Run(NamedTuple):
    """The newest checkpoint of a workdir."""

    exp: Experiment
    meta: Mapping[str, Any]
    state: dict[str, np.ndarray]  # the published state dict of our weights
    alignment_head: dict[str, np.ndarray] = {}  # SRA's, where the run trains one


def _read(workdir: Path, weights: str) -> Run:
    checkpoints = checkpoint_manager.of_run(workdir, "--workdir")
    try:
        step, _ = checkpoints.newest(arrays=checkpoint_manager.WEIGHTS)
        meta = checkpoints.meta(step)
        exp = experiment.of_checkpoint(checkpoints, step, jax.devices()[:1])
        if len(exp.config.model.readouts) > 1:
            raise UserError(
                f"model.readouts = {exp.config.model.readouts}: the published networks have one"
            )
        params = checkpoints.weights(step, weights, exp.replicated_params)
        head = _alignment_head(checkpoints, step, exp)
    finally:
        checkpoints.close()
    return Run(exp, meta, published(exp, params), head)


def _alignment_head(checkpoints: Checkpoints, step: int, exp: Experiment) -> dict[str, np.ndarray]:
    """SRA's head under its published names; empty where the checkpoint holds none."""
    if SELF_ALIGNMENT not in checkpoints.heads(step):
        return {}
    terms = checkpoints.terms(step, exp.abstract_state.terms)
    head = {HEADS_OF_TERMS: {SELF_ALIGNMENT: terms[SELF_ALIGNMENT]}}
    return parameter_names.to_published(jax.tree.map(np.asarray, head))


def published(exp: Experiment, params: Params) -> dict[str, np.ndarray]:
    """The published state dict of our weights, with the tables that such files carry."""
    state, model = parameter_names.to_published(jax.tree.map(np.asarray, params)), exp.config.model
    if model.options.rotary:
        tokens = exp.net.side // model.patch_size
        state |= parameter_names.rotary_tables(tokens, model.hidden_size // model.num_heads)
    return state


def _described(run: Run) -> Declared:
    """Declarations that the exported arrays do not make by themselves."""
    model, c = run.exp.config.model, run.meta["config"]
    family, process, codec = c["model"]["name"], c["process"], c["data"]["codec"]
    rounding = codec.get("rounding", CODECS[codec["name"]].rounding)
    return Declared(
        family=family,
        num_heads=model.num_heads,
        readout_depth=model.readouts[0] if model.readouts else None,
        time_direction=time_direction.OWN[family],
        num_classes=run.exp.num_classes,
        path=process.get("path"),
        prediction=process.get("prediction", "velocity") if process["name"] == "flow" else None,
        process=process["name"],
        time_scale=model.time_scale,
        mlp_ratio=model.mlp_ratio,
        label_drop=c["objective"]["label_drop"],
        codec=codec["name"],
        rounding=rounding if rounding in to_uint8.ROUNDING_RULES else None,
        self_conditioning=_self_conditioning(model),
    )


def _self_conditioning(model: TransformerSettings) -> dict[str, Any] | None:
    """The section of the config, with the block that a tap of None stands for."""
    on = model.self_conditioning
    return dataclasses.asdict(on) | {"tap": model.tap} if on else None


def _beyond_published(described: Declared) -> dict[str, float]:
    """Settings that no published class of the family has, with a number each."""
    family = described.family
    beyond = {}
    if described.time_scale != 1:
        beyond["time_scale"] = described.time_scale
    if described.process != ("ddpm" if family == "dit" else "flow"):
        beyond["process"] = 1.0
    if described.self_conditioning:
        beyond["self_conditioning"] = 1.0
    if family == "sit" and described.path == "vp":
        beyond["path"] = 1.0
    if family == "sit" and described.prediction not in ("velocity", None):
        beyond["prediction"] = 1.0
    return beyond


def _own_form(run: Run, origin: Original | None) -> tuple[dict[str, np.ndarray], Declared]:
    """The file of a network that is no published one, or no longer."""
    described, state = _described(run), run.state | run.alignment_head
    folded = time_direction.folded(
        state, described.family, described.time_direction, described.prediction
    )
    state |= folded
    if origin and not origin.has_null_class and not described.label_drop:
        state[LABELS] = np.ascontiguousarray(state[LABELS][:-1])
    for name, number in _beyond_published(described).items():
        state[f"{ONLY}{name}"] = np.float32([number])
    return state, described


def _origin(workdir: Path, run: Run) -> Original | None:
    """Arrays that import left out, if this run was imported and they can be read."""
    if not run.meta["imported"] or not (workdir / original.ORIGINAL_FILE).exists():
        return None
    try:
        return original.read(workdir)
    except UserError as error:
        console.say(f"{error}; exported without what the published file had besides")
        return None


def _is_as_imported(run: Run, weights: str) -> bool:
    """Returns whether these are the averaged weights of the file, that nothing was trained on."""
    alone = run.meta["imported"] in ("weights", True)
    return not run.meta["step"] and (alone or weights != "raw")


class Exported(NamedTuple):
    """Contents of an export: the arrays, declarations about them, and the model card."""

    state: dict[str, np.ndarray]
    declared: Declared
    card: str


def form(run: Run, origin: Original | None, weights: str, file: str) -> Exported:
    """A run's network as a published file.

    Args:
      origin: what import left out of the file that the run is from; None: it is from none.
      weights: which of the checkpoint's.
      file: the name that the file is to have.
    """
    restored = origin.restored(run.state) if origin and _is_as_imported(run, weights) else None
    state, described = (restored, origin.declared) if restored else _own_form(run, origin)
    values = len(state["final_layer.linear.bias"])
    about = Export(
        names=state.keys(),
        declared=described,
        with_sigma=values == 2 * run.exp.net.channels * run.exp.config.model.patch_size**2,
        rows=len(state[LABELS]),
        left_out=() if restored or not origin else _left_out(origin, state),
    )
    parameters = sum(
        array.size for name, array in run.state.items() if name not in parameter_names.DERIVED
    )
    shape = run.exp.net.latent_shape
    text = model_card.write(
        about, run.meta, file=file, weights=weights, parameters=parameters, latent_shape=shape
    )
    return Exported(state, described, text)


def export_checkpoint(workdir: Path, output: Path, weights: str) -> None:
    """Writes the newest checkpoint of a run as safetensors under the published names.

    Beside it lies its model card (.md, same name): what it is, how it was trained, its config.

    Raises:
      UserError: there is no checkpoint, no such average, or no published form of this network; the
        file cannot be written.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"--output={output}: must end in .safetensors")
    run = _read(workdir, weights)
    state, described, text = form(run, _origin(workdir, run), weights, output.name)
    _write(output, state, described, text)
    console.say(f"{output}: {len(state)} arrays, {pytree.num_bytes(state) / 2**20:,.1f} MiB")


def _left_out(origin: Original, state: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Lists what the published file had besides: training heads, a second half of its outputs."""
    heads = sorted({name.split(".")[0] for name in origin.arrays if name not in state})
    final = origin.arrays.get("final_layer.linear.bias")
    halved = final is not None and len(final) != len(state["final_layer.linear.bias"])
    return (*heads, *(["the learned sigma's half of its final layer"] if halved else []))


def _write(output: Path, state: dict[str, np.ndarray], described: Declared, text: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        state_dict.write_safetensors(output, state, to_metadata(described))
        files.write_text(output.with_suffix(".md"), text)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output={output}: cannot be written ({reason}); name another") from error
