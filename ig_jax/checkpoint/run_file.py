"""config.json: what a workdir says of its run, readable while it trains and after it.

It holds the resolved config, versions, the command line, the run that the weights come from if
there is one, and the settings that changed when the run resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ig_jax.checkpoint import compatibility
from ig_jax.errors import UserError
from ig_jax.io import files

FILE = "config.json"


def read(workdir: Path, field: str, fix: str) -> dict[str, Any]:
    """The record of the run in a workdir; its `config` is a dict.

    Args:
      field: names the workdir in messages.
      fix: what to do where there is no whole record.

    Raises:
      UserError: there is none, or it is damaged.
    """
    file = workdir / FILE
    if not file.exists():
        raise UserError(f"{field}={workdir}: holds no {FILE} of a run; {fix}")
    match files.read_json(file):
        case {"config": dict(), **rest} as record if isinstance(rest.get("changes", []), list):
            return record
    raise UserError(f"{file}: is damaged; {fix}")


def changes(
    earlier: list[Any], old: Mapping[str, Any], new: Mapping[str, Any], step: int
) -> list[dict[str, Any]]:
    """The changes of a run's settings so far, each {step, field, before, now}.

    Args:
      earlier: as recorded before; those at later steps than this are undone.
      old: the raw config under which the checkpoint of the step was made.
      new: that of the run as it goes on.
      step: at which it resumes.
    """
    kept = [c for c in earlier if isinstance(c, dict) and c.get("step", step) < step]
    return kept + [
        {"step": step, "field": field, "before": before, "now": now}
        for field, before, now in compatibility.changed_fields(old, new)
    ]
