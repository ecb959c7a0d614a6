"""Checkpoints that cannot be read: what is wrong with one, and where it is put.

Process 0 looks at the files, and all processes go by what it finds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import jax

from ig_jax.checkpoint import integrity, metadata
from ig_jax.checkpoint.integrity import Damaged
from ig_jax.monitoring import console
from ig_jax.parallel.processes import barrier, from_process_0

FOLDER = "unreadable"  # beside the folder of checkpoints


def damage(checkpoint: Path, arrays: tuple[str, ...]) -> str:
    """Describes what is wrong with a checkpoint's files; '': nothing.

    `arrays`: the items that must be whole, beside `meta`.
    """
    fault = _damage_here(checkpoint, arrays) if jax.process_index() == 0 else ""
    if from_process_0(bool(fault)):
        return fault or "process 0 cannot read it"
    return ""


def _damage_here(checkpoint: Path, arrays: tuple[str, ...]) -> str:
    try:
        lacking = metadata.LACKING[metadata.read(checkpoint)["imported"]]
        items = [name for name in arrays if name not in lacking]
        integrity.require_whole(checkpoint, items, nested=["opt_state"])
    except Damaged as error:
        return f"{error.file.relative_to(checkpoint)} {error.fault}"
    return ""


def leave_out(directory: Path, faults: Mapping[int, str], used: int, *, move: bool) -> None:
    """Says which checkpoints cannot be read, and with `move` puts them out of the way.

    Args:
      directory: that holds the checkpoints.
      faults: what is wrong, by step.
      used: the step that is used instead.
      move: to a folder beside `directory`, so that their steps can be saved again.
    """
    for step, fault in faults.items():
        checkpoint, where = directory / str(step), "left out"
        if move:
            aside = _aside(directory.parent / FOLDER, step)
            where = f"put aside as {aside}"
            if jax.process_index() == 0:
                aside.parent.mkdir(exist_ok=True)
                checkpoint.rename(aside)
        console.say(f"{checkpoint} cannot be read ({fault}): {where}; step {used} is used")
    if faults and move:
        barrier("unreadable checkpoints are put aside")


def _aside(folder: Path, step: int) -> Path:
    """A path of that step that is still free."""
    names = itertools.chain([f"{step}"], (f"{step}-{n}" for n in itertools.count(2)))
    return next(path for name in names if not (path := folder / name).exists())
