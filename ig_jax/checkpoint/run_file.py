"""config.json: what a workdir says of its run, readable while it trains and after it.

It holds the resolved config, versions, the command line, the run that the weights come from if
there is one, and the settings that changed when the run resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ig_jax.checkpoint import compatibility, versions
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


def write(
    workdir: Path,
    config: Mapping[str, Any],
    init_from: Mapping[str, Any] | None,
    step: int,
    made_under: Mapping[str, Any] | None,
) -> None:
    """Writes the record of a run that starts or resumes.

    Args:
      config: raw, as the run goes on.
      init_from: the run that the weights of step 0 are of; None: they are fresh.
      step: at which it resumes.
      made_under: the raw config under which the checkpoint of that step was made; None at step 0.
    """
    record = {"config": dict(config), "versions": versions.versions(), "command": sys.argv}
    if init_from is not None:
        record["init_from"] = init_from
    if made_under is not None:
        earlier = []
        with suppress(UserError):  # a record that is lost or damaged is written anew
            earlier = read(workdir, "--workdir", "").get("changes", [])
        # Those of later steps are undone.
        kept = [c for c in earlier if isinstance(c, dict) and c.get("step", step) < step]
        record["changes"] = kept + [
            {"step": step, "field": field, "before": before, "now": now}
            for field, before, now in compatibility.changed_fields(made_under, config)
        ]
    files.write_json(workdir / FILE, record)
