"""The config of a run, as its workdir recorded it. `main.py` takes it where none is named:

python main.py --workdir=runs/digits --mode=sample --config.sample.ig.scale=1.5
python main.py --config=configs/workdir.py:runs/digits --workdir=runs/copy    # the same run anew
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import base
from ig_jax.errors import UserError
from ig_jax.io import files

RECORD = "config.json"


def get_config(workdir: str = "") -> ConfigDict:
    """The recorded config; sections that are newer than the run are those of `base`.

    Raises:
      UserError: the workdir has no record, or a damaged one.
    """
    file = Path(workdir) / RECORD
    if not workdir or not file.exists():
        raise UserError(f"--workdir={workdir}: holds no {RECORD} of a run; name its --config")
    record = files.read_json(file)
    recorded = record.get("config") if isinstance(record, dict) else None
    if not isinstance(recorded, dict):
        raise UserError(f"{file}: is damaged; name the --config of this run")
    return ConfigDict({**base.get_config().to_dict(), **_tuples(recorded)})


def _tuples(value: Any) -> Any:
    """JSON has lists in place of tuples."""
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
