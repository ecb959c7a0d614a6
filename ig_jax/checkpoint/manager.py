"""Checkpoints: asynchronous, atomic, with everything that resuming needs.

A checkpoint is one orbax step directory with four items: `params`, `opt_state`, `ema` (so that
sampling reads only what it uses) and `meta` (step, data position, resolved config, versions); where
loss terms train heads, those are a fifth, `terms`, and averages of them a sixth, `ema_terms`, which
only training reads. A save that was cut
short leaves a temporary directory which is never mistaken for a checkpoint. One that cannot be read
is left out, and a save that a full disk refuses stops nothing before `wait`.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from ig_jax.checkpoint import (
    compatibility,
    composed_average,
    integrity,
    malloc_arenas,
    metadata,
    orbax_leak,
    unreadable,
)
from ig_jax.checkpoint.integrity import Damaged
from ig_jax.errors import UserError, shown
from ig_jax.io import disk_errors
from ig_jax.monitoring import console, library_logs
from ig_jax.optim import ema
from ig_jax.optim.ema import Averages
from ig_jax.optim.train_state import AVERAGED_HEADS, HEADS_OF_TERMS, TrainState
from ig_jax.parallel.processes import barrier
from ig_jax.types import Params

# The items that hold arrays: those of every run, those of runs whose loss terms have heads, and
# those that sampling may want.
ARRAY_ITEMS = ("params", "opt_state", "ema")
HEAD_ITEMS = (HEADS_OF_TERMS, AVERAGED_HEADS)
WEIGHTS = ("params", "ema")

_T = TypeVar("T")


class CheckpointError(UserError):
    """A workdir that cannot be used as asked."""


class SaveFailed(UserError):
    """There was no room for a checkpoint."""


# What orbax's file layer takes for something else than a part of a name: it then writes elsewhere.
UNUSABLE = re.compile(r"\\|\[.*\]", re.DOTALL)


def _items(state: TrainState) -> dict[str, Any]:
    """The items of a state that hold arrays; those that it lacks are left out."""
    items = {name: getattr(state, name) for name in ARRAY_ITEMS}
    held = {name: item for name, item in items.items() if item is not None}
    heads = {name: getattr(state, name) for name in HEAD_ITEMS}
    return held | {name: item for name, item in heads.items() if item}


def _no_room(error: Exception) -> int | None:
    """The system's number of the error if a save failed for want of space; else None."""
    number = disk_errors.number(error)
    return number if number in disk_errors.FULL else None


def check_folder(workdir: Path) -> None:
    """Raises CheckpointError if checkpoints in this folder would not be found again."""
    path = str(workdir.absolute())
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"--workdir={str(workdir)!r}: its path is no UTF-8, as checkpoints need; name another"
        ) from error
    if UNUSABLE.search(path):
        raise CheckpointError(
            f"--workdir={workdir}: checkpoints cannot be kept under a path with a backslash or "
            "with brackets; name another"
        )


class Checkpoints:
    """The checkpoints of one workdir.

    With `reading`, another program may be writing them: nothing is saved, moved or removed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep_last: int = 1,
        keep_every_steps: int = 0,
        reading: bool = False,
        folder: str = "checkpoints",
    ):
        check_folder(workdir)
        policies = [keep.LatestN(keep_last)]
        if keep_every_steps:
            policies.append(keep.EveryNSteps(keep_every_steps))
        self._policy = keep.AnyPreservationPolicy(policies)
        self._reading = reading
        self.workdir = workdir
        self.directory = (workdir / folder).absolute()
        self._manager = self._open()
        self._asked: int | None = None  # the step of the newest save
        self._failure = ""  # why that is not on disk

    def _open(self) -> ocp.CheckpointManager:
        orbax_leak.stop()
        malloc_arenas.limit()
        self._remove_damaged_records()
        with library_logs.errors_only():  # orbax warns that a run to be read is not written to
            return ocp.CheckpointManager(
                self.directory,
                item_names=(*ARRAY_ITEMS, *HEAD_ITEMS, "meta"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    cleanup_tmp_directories=not self._reading,
                    create=not self._reading,
                    read_only=self._reading,
                ),
            )

    def _remove_damaged_records(self) -> None:
        """Raises CheckpointError where there are any and nothing may be removed."""
        steps = self.directory.glob("*") if jax.process_index() == 0 else ()
        for step in filter(integrity.has_damaged_record, steps):
            file = step / integrity.RECORD
            if self._reading:
                raise CheckpointError(f"{file}: is damaged; remove it, for nothing needs it")
            file.unlink()
        barrier("records are whole")

    def latest_step(self) -> int | None:
        """The newest checkpoint, or the save that is under way."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def require_step(self, step: int, field: str) -> None:
        """Raises CheckpointError unless there is a checkpoint of the step that `field` names."""
        steps = self.all_steps()
        if step not in steps:
            raise CheckpointError(
                f"{field} = {shown(step)}: {self.workdir} holds no such checkpoint, only "
                f"{', '.join(map(str, steps))}"
            )

    def save(
        self,
        state: TrainState,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        imported: str = "",
    ) -> None:
        """Starts writing; returns when the state has been copied and may be donated.

        A full disk is reported, here or when the next save starts, and stops nothing.
        `imported`: what came from elsewhere, 'weights' alone or the whole 'state'; '': nothing.
        """
        self._settle()
        malloc_arenas.trim()  # of what the save before took
        step = int(jax.device_get(state.step))
        meta = metadata.new_record(step, data, config, imported)
        arrays = {name: ocp.args.StandardSave(x) for name, x in _items(state).items()}
        items = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays)
        self._asked, self._failure = step, ""
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            self._give_up(error)

    def _settle(self) -> None:
        """Waits for the save that is under way; gives it up if there was no room for it."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Removes what there is of the newest save, and says so; raises any other error.

        Raises:
          SaveFailed: there are other processes, which still wait for this one in the same save.
        """
        number = _no_room(error)
        if number is None:
            raise error
        why = f"step {self._asked} is not saved: {os.strerror(number)}"
        if jax.process_count() > 1:
            raise SaveFailed(
                f"{why} ({disk_errors.room(self.directory)}); {self._way_out()}"
            ) from error
        self._abandon()
        self._failure = f"{why} ({disk_errors.room(self.directory)})"
        console.say(f"{self._failure}; the next save is tried all the same")

    def _abandon(self) -> None:
        """Starts over with what is on disk: after a failure the manager's list is wrong.

        It then names a save that is not there, or has forgotten older ones.
        """
        for _ in range(3):  # each part of a save may have an error of its own, and raises it once
            try:
                self._manager.close()
                break
            except Exception as error:
                if _no_room(error) is None:
                    raise
        self._remove_partial_saves()
        self._manager = self._open()

    def _remove_partial_saves(self) -> None:
        for _ in range(100):  # writes that orbax dropped may still put a file there
            for partial in self.directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(partial, ignore_errors=True)
            time.sleep(0.05)
            if not any(self.directory.glob("*.orbax-checkpoint-tmp")):
                return

    def _way_out(self) -> str:
        there = sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())
        newest = f"step {there[-1]} is the newest one that is" if there else "no other one is"
        return f"{newest}; make room and run the same command again"

    def newest(
        self, read: Callable[[int], _T] = lambda step: step, arrays: tuple[str, ...] = ARRAY_ITEMS
    ) -> tuple[int, _T]:
        """The newest checkpoint that can be read: its step, and what `read` makes of it.

        Newer ones are named with what is wrong with them; unless `reading`, they are put aside, so
        that their steps can be saved again.

        Args:
          read: from a step.
          arrays: the items that `read` needs, beside `meta`.

        Raises:
          CheckpointError: none can be read.
        """
        faults: dict[int, str] = {}
        for step in reversed(self.all_steps()):
            fault = unreadable.damage(self.directory / str(step), arrays)
            if not fault:
                try:
                    result = read(step)
                except Exception as error:
                    if jax.process_count() > 1 or not integrity.is_undecodable(error):
                        raise
                    fault = "an array is garbled"
            if not fault:
                unreadable.leave_out(self.directory, faults, step, move=not self._reading)
                if faults and not self._reading:
                    self._manager.reload()
                return step, result
            faults[step] = fault
        faulty = "; ".join(f"{step}: {fault}" for step, fault in faults.items())
        raise CheckpointError(
            f"{self.directory}: holds no checkpoint that can be read ({faulty}); put back copies "
            "of its files, or train anew in another --workdir"
        )

    def meta(self, step: int) -> dict[str, Any]:
        """{'step', 'data', 'config', 'versions', 'imported'} of a checkpoint.

        Raises:
          CheckpointError: it is damaged.
        """
        folder = self.directory / str(step)
        try:
            return metadata.read(folder)
        except Damaged as error:
            raise CheckpointError(f"{error.file}: {error.fault}; choose another step") from error

    def imported(self, step: int) -> str:
        """The imported part of a checkpoint: 'weights', 'state', or '' for nothing."""
        return self.meta(step)["imported"]

    def param_shapes(self, step: int) -> Params:
        """The parameters of a checkpoint, abstract."""
        return ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / "params").tree

    def heads(self, step: int) -> tuple[str, ...]:
        """The loss terms whose heads a checkpoint holds."""
        folder = self.directory / str(step) / HEADS_OF_TERMS
        if not folder.is_dir():
            return ()
        return tuple(sorted(ocp.StandardCheckpointHandler().metadata(folder).tree))

    def require(
        self,
        step: int,
        config: Mapping[str, Any],
        sections: tuple[str, ...],
        fix: str = "use its settings, or another --workdir",
    ) -> None:
        """Raises CheckpointError, naming the fields, if another config made this checkpoint."""
        different = compatibility.mismatches(self.meta(step)["config"], config, sections)
        if different:
            raise CheckpointError(
                f"{self.directory} holds a run with other settings ({'; '.join(different)}): {fix}"
            )

    def _read(self, step: int, like: Mapping[str, Any]) -> Mapping[str, Any]:
        items = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step`; `like` is abstract, its leaves say where each is to be.

        Every device reads its own shards, however many devices wrote them. A part of `like` that is
        None is not read.
        """
        items = self._read(step, _items(like))
        count = jax.device_put(np.int32(step), like.step.sharding)
        return like.replace(step=count, **items)

    def weights(self, step: int, which: str, like: Params) -> Params:
        """Raw or averaged weights of a step: `raw`, `ema` (the first decay), or an average.

        An average may be one that --mode=ema composed. Leaves of `like` are abstract, and say where
        each is to be.

        Raises:
          UserError: there is no such average, or it is to be composed first.
        """
        names, length = ema.in_config(self.meta(step)["config"]["train"]), ema.length(which)
        if length is not None and which not in names:
            return composed_average.read(self.workdir, step, length, like)
        if which == "raw" or self.imported(step) == "weights":
            return self._read(step, {"params": like})["params"]
        if which not in ("ema", *names):
            raise CheckpointError(
                f"sample.weights = {which!r}: {self.directory} holds raw and the averages "
                f"{', '.join(names)}"
            )
        return self.averages(step, names, like)[names[0] if which == "ema" else which]

    def averages(self, step: int, names: Sequence[str], like: Params) -> Averages:
        """The averages of a checkpoint; `names` are all that it holds, `like` as for `weights`."""
        return self._read(step, {"ema": dict.fromkeys(names, like)})["ema"]

    def remove(self, step: int) -> None:
        self._manager.delete(step)

    def terms(self, step: int, like: Params) -> Params:
        """The heads of loss terms of a checkpoint, all that it holds, placed as `like`."""
        return self._read(step, {HEADS_OF_TERMS: like})[HEADS_OF_TERMS]

    def wait(self) -> None:
        """Returns when everything asked for is on disk.

        Raises:
          SaveFailed: there was no room for the newest save.
        """
        self._settle()
        if self._failure:
            raise SaveFailed(f"{self._failure}; {self._way_out()}")

    def close(self) -> None:
        self._settle()
        self._manager.close()


def of_run(workdir: Path, field: str) -> Checkpoints:
    """The checkpoints of a run that has at least one, to be read and closed.

    `field` names the workdir.

    Raises:
      UserError: there is none.
    """
    if not (workdir / "checkpoints").is_dir():
        raise UserError(
            f"{field}={workdir}: holds no checkpoint; train there first (--mode=train), or name "
            "another run"
        )
    checkpoints = Checkpoints(workdir, reading=True)
    if checkpoints.latest_step() is None:
        checkpoints.close()
        raise UserError(f"{field}={workdir}: holds no finished checkpoint; train on (--mode=train)")
    return checkpoints
