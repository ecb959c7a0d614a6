"""What a checkpoint holds beside arrays: its step, data position, config and versions."""

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
            "data": {"next_index": int(index)},
            "config": {"train": {"ema_decays": [*decays]}, **sections},
            "versions": dict(),
        } as metadata if (
            step == int(folder.name)
            and index >= 0
            and all(isinstance(decay, float | int) for decay in decays)
            and all(isinstance(section, dict | int) for section in sections.values())
        ):
            imported = metadata.get("imported", "")
            if isinstance(imported, bool):  # as it was written at first
                imported = "weights" if imported else ""
            if isinstance(imported, str) and imported in LACKING:
                return metadata | {"imported": imported}
    raise Damaged(file, "is not what was written")
