"""Metadata of a checkpoint: its step, data position, config and versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ig_jax.checkpoint import compatibility, integrity
from ig_jax.checkpoint.integrity import Damaged
from ig_jax.checkpoint.versions import versions
from ig_jax.optim.train_state import HEADS_OF_TERMS

# What was imported: weights alone, what training goes on from, or nothing -> the items of arrays
# that such a checkpoint does not hold.
LACKING = {"weights": ("opt_state", "ema", HEADS_OF_TERMS), "state": (HEADS_OF_TERMS,), "": ()}


def new_record(
    step: int, data: Mapping[str, Any], config: Mapping[str, Any], imported: str
) -> dict[str, Any]:
    """The metadata of a new checkpoint."""
    return {
        "step": step,
        "data": data,
        "config": compatibility.as_json(config),
        "versions": versions(),
        "imported": imported,
    }


def read(folder: Path) -> dict[str, Any]:
    """Reads the metadata of a checkpoint's folder, as `make` gives it.

    Raises:
      Damaged: it is missing, no JSON, or lacks what it was written with.
    """
    file = folder / "meta" / "metadata"
    match integrity.parse(file):
        case {
            "step": int(step),
            "data": dict(data),
            "config": {"train": {"ema_decays": [*decays], **train}, **sections},
            "versions": dict(),
        } as metadata if (
            step == int(folder.name)
            and (examples := _examples(data, train)) is not None
            and all(isinstance(decay, float | int) for decay in decays)
            and all(isinstance(section, dict | int) for section in sections.values())
        ):
            imported = metadata.get("imported", "")
            if isinstance(imported, bool):  # as it was written at first
                imported = "weights" if imported else ""
            if isinstance(imported, str) and imported in LACKING:
                return metadata | {"imported": imported, "data": {"examples": examples}}
    raise Damaged(file, "is not what was written")


def _examples(data: Mapping[str, Any], train: Mapping[str, Any]) -> int | None:
    """The examples that were seen; None where the metadata do not say."""
    match data, train:
        case {"examples": int(examples)}, _:
            pass
        case {"next_index": int(batch)}, {"batch_size": int(size)}:  # as older runs have it
            examples = batch * size
        case _:
            return None
    return examples if examples >= 0 else None
