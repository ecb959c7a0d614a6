"""Starting a run from the weights of another one (--init_from=WORKDIR[@STEP]).

The averaged weights become the parameters and all averages of step 0; optimizer, data order and
everything else are the new run's. Readouts and self-conditioning that the other network lacks are
fresh; fresh self-conditioning changes nothing of what the network computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import jax

from ig_jax import pytree
from ig_jax.checkpoint import compatibility, run_file
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.checkpoint.manager import CheckpointError, Checkpoints
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.io import paths
from ig_jax.monitoring import console
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState
from ig_jax.parallel.mesh import replicated
from ig_jax.training.step import init_state
from ig_jax.types import Params

FLAG = "--init_from"
SELF_CONDITIONING = "self_conditioning"  # the section of the model, and its parameters


def parsed(text: str) -> dict[str, Any]:
    """{'workdir', 'step'} of WORKDIR[@STEP]; step None is the newest."""
    found = re.fullmatch(r"(.+)@([0-9]{1,9})", text)
    if found is None or Path(paths.given(text, FLAG)).is_dir():  # a folder may have such a name
        return {"workdir": str(Path(paths.given(text, FLAG)).absolute()), "step": None}
    return {"workdir": str(Path(paths.given(found[1], FLAG)).absolute()), "step": int(found[2])}


def recorded(workdir: Path) -> dict[str, Any] | None:
    """The start of a run as its config.json has it, as `parsed`; None: fresh weights."""
    with suppress(UserError):
        return run_file.read(workdir, "--workdir", "").get("init_from")
    return None


def chosen(workdir: Path, given: str | None, *, begun: bool) -> dict[str, Any] | None:
    """The start of the run in `workdir`, as `parsed`; None: fresh weights.

    Args:
      given: the flag.
      begun: whether the run has a checkpoint.

    Raises:
      UserError: it has begun otherwise than the flag says.
    """
    before = recorded(workdir)
    if given is None:
        return before
    now = parsed(given)
    if not begun:
        return now
    same = before is not None and before["workdir"] == now["workdir"]
    if not same or now["step"] not in (None, before["step"]):
        start = f"from {before['workdir']}@{before['step']}" if before else "from other weights"
        raise UserError(
            f"{FLAG}={given}: the run in {workdir} has begun {start}; leave the flag out to resume "
            "it, or name another --workdir"
        )
    return before


def start(exp: Experiment, source: Mapping[str, Any]) -> tuple[TrainState, int]:
    """The state of step 0 with the weights of another run, and the step that they are of.

    Args:
      exp: the run that starts.
      source: of `chosen`.

    Raises:
      UserError: there is no such checkpoint, or it is of another network.
    """
    workdir = Path(source["workdir"])
    with closing(checkpoint_manager.of_run(workdir, FLAG)) as checkpoints:
        step = source["step"]
        if step is None:
            step, _ = checkpoints.newest()
        checkpoints.require_step(step, FLAG)
        _require_same_network(exp, checkpoints, step)
        weights = _weights(exp, checkpoints, step)
    fresh = init_state(exp)
    heads = fresh.params.get("heads", {})
    new = sorted(set(heads) - set(weights["heads"]))
    said = f"starting from the weights of {workdir} at step {step}"
    depths = ", ".join(name.removeprefix("depth_") for name in new)
    said += f"; fresh readouts at depth {depths}" if new else ""
    adds = SELF_CONDITIONING in fresh.params.keys() - weights.keys()
    console.say(said + ("; fresh self-conditioning" if adds else ""))
    heads = {name: weights["heads"].get(name, head) for name, head in heads.items()}
    rest = {name: weights.get(name, values) for name, values in fresh.params.items()}
    params = {name: heads if name == "heads" else values for name, values in rest.items()}
    return fresh.replace(params=params, ema=ema.init(params, exp.config.train.averages)), step


def _require_same_network(exp: Experiment, checkpoints: Checkpoints, step: int) -> None:
    """Raises CheckpointError where more is another than readouts and added self-conditioning."""
    old, new = checkpoints.meta(step)["config"], exp.config.raw
    added = {n: s for n, s in new["model"].items() if n == SELF_CONDITIONING}
    old = {**old, "model": {**added, **old["model"], "readouts": new["model"]["readouts"]}}
    different = compatibility.mismatches(old, new, compatibility.SAMPLES)
    ours, theirs = (
        {path: leaf.shape for path, leaf in pytree.flatten(tree).items()}
        for tree in (exp.abstract_params, checkpoints.param_shapes(step))
    )
    different += [
        f"{path}: {list(theirs[path])} there, {list(shape)} here"
        for path, shape in ours.items()
        if path in theirs and theirs[path] != shape
    ]
    if different:
        raise CheckpointError(
            f"{FLAG}={checkpoints.workdir}: is of another network ({'; '.join(different[:5])}); "
            "use its settings"
        )


def _weights(exp: Experiment, checkpoints: Checkpoints, step: int) -> Params:
    """The averaged weights of a checkpoint, placed as this run's; all that it holds."""
    placed = pytree.flatten(exp.abstract_state.params)
    whole = replicated(exp.mesh)

    def like(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = placed[path].sharding if path in placed else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    abstract = pytree.map_named(like, checkpoints.param_shapes(step))
    return {"heads": {}, **checkpoints.weights(step, "ema", abstract)}
