"""--mode=import and --mode=export: published checkpoints in, safetensors under their names out."""

from __future__ import annotations

import json
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from ig_jax import build, checkpoint, logs, sharding, tree
from ig_jax.checkpoint import Checkpoints, TrainState
from ig_jax.config import parse
from ig_jax.errors import UserError
from ig_jax.formats import state_dict
from ig_jax.interop import names
from ig_jax.interop.recognise import Recognised, recognise

CONFIG = '''"""{title}

  python main.py --config={path} --workdir={workdir} --mode=sample
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {values}
    )
'''


def _config(found: Recognised, base: ConfigDict) -> ConfigDict:
    """A complete run of the network that was found, on made-up latents of its shape."""
    c = ConfigDict(base.to_dict())
    c.model = ConfigDict(found.model)
    source = {"side": found.side, "channels": found.channels, "num_classes": found.classes}
    c.data.source = ConfigDict({"name": "synthetic", "size": 1_281_167, **source})
    c.data.codec = ConfigDict({"name": "as_stored"})
    c.train.epochs = 80.0  # to be changed before training on
    if not found.model["readouts"]:
        del c.objective.terms.internal_guidance
        c.sample.ig.scale = 1.0
    return c


def import_(
    file: Path, workdir: Path, base: ConfigDict, *, readout_depth: int = 0, family: str = ""
) -> Path:
    """Writes a published network to `workdir` as a checkpoint of step 0, with its config.

    Args:
      file: .pt, .pth or .safetensors; averaged weights are preferred where it has several.
      workdir: must hold no run yet.
      base: everything that the file does not say.
      readout_depth, family: what must be told, see `recognise`.

    Returns:
      The config file that was written.

    Raises:
      UserError: the file is not readable or not known; the workdir holds a run.
    """
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir}: holds a run already; name another")
    key, state = state_dict.read(file, "--checkpoint")
    found = recognise(state, readout_depth, family)
    c = _config(found, base)
    exp = build.experiment(parse(c, jax.device_count()))
    try:
        params = names.from_published(found.state, exp.abstract_params)
    except ValueError as error:
        raise UserError(f"--checkpoint={file}: {error}") from error
    # What is not needed any more is let go: an XL network is 2.7 GB each time.
    state.clear()
    found.state.clear()
    placed = sharding.replicated(exp.mesh)
    params = jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), params), placed)
    _save(params, c, workdir)
    lines = [
        f"{file}: {found.model['name']}, {tree.count(params):,} parameters, from {key!r}",
        f"depth {found.model['depth']}, width {found.model['hidden_size']}, "
        f"heads {found.model['num_heads']}, patch {found.model['patch_size']}, latents "
        f"{found.side} x {found.side} x {found.channels}, {found.classes} classes, readouts "
        f"{found.model['readouts']}",
        *found.notes,
    ]
    path = workdir / "config.py"
    values = pprint.pformat(c.to_dict(), indent=1, width=90, sort_dicts=False)
    title = f"Imported from {file.name}."
    path.write_text(CONFIG.format(title=title, path=path, workdir=workdir, values=values))
    for line in [*lines, f"sample it: --config={path} --workdir={workdir} --mode=sample"]:
        logs.say(line)
    return path


def _save(params: Mapping[str, Any], c: ConfigDict, workdir: Path) -> None:
    """A checkpoint of step 0 that holds these parameters alone, which no optimizer has seen."""
    checkpoints = Checkpoints(workdir)
    state = TrainState(jax.numpy.int32(0), params, opt_state=None, ema=None)
    checkpoints.save(state, {"next_index": 0}, c.to_dict())
    checkpoints.wait()
    checkpoints.close()


def export(workdir: Path, output: Path, weights: str) -> None:
    """Writes the newest checkpoint of a run as safetensors under the published names.

    A model card (.json, same name) says which run and step it is, and its config.

    Raises:
      UserError: there is no checkpoint, no such average, or no published form of this network.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"--output={output}: must end in .safetensors")
    checkpoints = checkpoint.of_run(workdir, "--workdir")
    try:
        step = checkpoints.latest_step()
        meta = checkpoints.meta(step)
        exp = build.experiment(parse(ConfigDict(meta["config"])), jax.devices()[:1])
        if len(exp.config.model.readouts) > 1:
            raise UserError(
                f"model.readouts = {exp.config.model.readouts}: the published networks have one"
            )
        placed = sharding.replicated(exp.mesh)
        params = checkpoints.weights(step, weights, exp.abstract_params, placed)
    finally:
        checkpoints.close()
    state = names.to_published(jax.tree.map(np.asarray, params))
    card = {
        "step": step,
        "weights": weights,
        "config": meta["config"],
        "made_with": meta["versions"],
    }
    save_file(state, output, metadata={"format": "pt", "ig_jax": json.dumps(card)})
    logs.write_json(output.with_suffix(".json"), card)
    logs.say(f"{output}: {len(state)} arrays, {tree.num_bytes(state) / 2**20:,.1f} MiB")
