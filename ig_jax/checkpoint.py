"""Checkpoints: asynchronous, atomic, with everything that resuming needs.

A checkpoint is one orbax step directory with four items: `params`, `opt_state`, `ema` (so that
sampling reads only what it uses) and `meta` (step, data position, resolved config, versions). A
save that was cut short leaves a temporary directory which is never mistaken for a checkpoint.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from ig_jax import tree
from ig_jax.ema import Averages
from ig_jax.errors import UserError
from ig_jax.types import Abstract, Params

# What must be the same for a run to be continued, and for its weights to be sampled from.
CONTINUES = ("seed", "model", "process", "data", "objective", "optim", "train")
SAMPLES = ("model", "process")
# What must be the same for an imported optimizer's state to be used.
UPDATES = ("optim",)
# Fields of those that may differ: they change how far or how fast, not what.
FREE = (
    "train.steps",
    "train.images",
    "train.epochs",
    "train.steps_per_dispatch",
    "model.remat",
    "model.unroll",
    # Where files lie; that they are of the same kind is checked against the record beside them.
    "data.source.path",
    "data.codec.weights",
    "data.codec.statistics",
)
# What matters to training alone, or to rounding.
FREE_WHEN_SAMPLING = (
    "model.dtype",
    "process.time_distribution",
    "process.time_mean",
    "process.time_std",
)
# What an imported optimizer's state may be trained on with: they change the step, not the state.
FREE_OF_STATE = (
    "optim.learning_rate",
    "optim.weight_decay",
    "optim.warmup_steps",
    "optim.schedule",
    "optim.ns_steps",
    "optim.ns_dtype",
)


class CheckpointError(UserError):
    """A workdir that cannot be used as asked."""


@struct.dataclass
class TrainState:
    """Everything a training step changes. No key: randomness is addressed by (seed, step)."""

    step: jax.Array | Abstract  # int32, updates done
    params: Params
    opt_state: optax.OptState | None  # None: imported weights, that no optimizer has seen
    ema: Averages | None  # None: imported weights, which are averages already


def versions() -> dict[str, str]:
    """Of what could change numbers."""
    modules = {"jax": jax, "flax": flax, "optax": optax, "orbax": ocp, "numpy": np}
    found = {name: module.__version__ for name, module in modules.items()}
    return found | {"python": platform.python_version()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists, so that old and new compare equal."""
    return json.loads(json.dumps(config))


def mismatches(
    old: Mapping[str, Any], new: Mapping[str, Any], sections: tuple[str, ...]
) -> list[str]:
    """Fields of `sections` in which two raw configs differ, other than the free ones."""

    free = FREE + {SAMPLES: FREE_WHEN_SAMPLING, UPDATES: FREE_OF_STATE}.get(sections, ())

    def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
        flat = tree.flatten({s: config[s] for s in sections if s in config})
        return tree.unflatten({p: v for p, v in flat.items() if p not in free})

    return tree.differences(chosen(_plain(old)), chosen(_plain(new)))


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, *, keep_last: int = 1, keep_every_steps: int = 0):
        policies = [keep.LatestN(keep_last)]
        if keep_every_steps:
            policies.append(keep.EveryNSteps(keep_every_steps))
        self.directory = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("params", "opt_state", "ema", "meta"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                create=True,
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: TrainState,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        imported: str = "",
    ) -> None:
        """Starts writing; returns when the state has been copied and may be donated.

        `imported`: what came from elsewhere, 'weights' alone or the whole 'state'; '': nothing.
        """
        step = int(jax.device_get(state.step))
        meta = {"step": step, "data": data, "config": _plain(config), "versions": versions()}
        meta["imported"] = imported
        items = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema}
        arrays = {
            name: ocp.args.StandardSave(item) for name, item in items.items() if item is not None
        }
        self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays))

    def meta(self, step: int) -> dict[str, Any]:
        """{'step', 'data', 'config', 'versions', 'imported'} of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def imported(self, step: int) -> str:
        """What of a checkpoint was imported: 'weights', 'state', or '' for nothing."""
        found = self.meta(step).get("imported", "")
        return {True: "weights", False: ""}.get(found, found)  # as it was written at first

    def param_shapes(self, step: int) -> Params:
        """The parameters of a checkpoint, abstract."""
        return ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / "params").tree

    def require(
        self,
        step: int,
        config: Mapping[str, Any],
        sections: tuple[str, ...],
        mend: str = "use its settings, or another --workdir",
    ) -> None:
        """Raises CheckpointError, naming the fields, if another config made this checkpoint."""
        different = mismatches(self.meta(step)["config"], config, sections)
        if different:
            raise CheckpointError(
                f"{self.directory} holds a run with other settings ({'; '.join(different)}): {mend}"
            )

    def _read(self, step: int, like: Mapping[str, Any]) -> Mapping[str, Any]:
        items = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step`; `like` is abstract, its leaves say where each is to be.

        Every device reads its own shards, however many devices wrote them. A part of `like` that is
        None is not read.
        """
        items = {"params": like.params, "opt_state": like.opt_state, "ema": like.ema}
        found = self._read(step, {n: x for n, x in items.items() if x is not None})
        count = jax.device_put(np.int32(step), like.step.sharding)
        return TrainState(count, *(found.get(name) for name in items))

    def weights(self, step: int, which: str, like: Params) -> Params:
        """Raw or averaged weights of a checkpoint: `raw`, `ema` (the first decay), or a decay.

        Leaves of `like` are abstract, and say where each is to be.
        """
        if which == "raw" or self.imported(step) == "weights":
            return self._read(step, {"params": like})["params"]
        decays = [str(d) for d in self.meta(step)["config"]["train"]["ema_decays"]]
        found = self._read(step, {"ema": {decay: like for decay in decays}})["ema"]
        if which != "ema" and which not in found:
            raise CheckpointError(
                f"sample.weights = {which!r}: {self.directory} holds raw and the averages "
                f"{', '.join(decays)}"
            )
        return found[decays[0] if which == "ema" else which]

    def wait(self) -> None:
        """Returns when everything asked for is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def of_run(workdir: Path, field: str) -> Checkpoints:
    """The checkpoints of a run that has at least one, to be closed; `field` names the workdir.

    Raises:
      UserError: there is none.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"{field}={workdir}: holds no checkpoint; train there first (--mode=train), or name "
            "another run"
        )
    checkpoints = Checkpoints(workdir)
    if checkpoints.latest_step() is None:
        checkpoints.close()
        raise UserError(f"{field}={workdir}: holds no finished checkpoint; train on (--mode=train)")
    return checkpoints
