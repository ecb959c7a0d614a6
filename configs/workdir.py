"""The config of a run, as its workdir recorded it. `main.py` takes it where none is named:

python main.py --workdir=runs/digits --mode=sample --config.sample.ig.scale=1.5
python main.py --config=configs/workdir.py:runs/digits --workdir=runs/copy    # the same run anew
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import base
from ig_jax.checkpoint import run_file
from ig_jax.errors import UserError


def get_config(workdir: str = "") -> ConfigDict:
    """The recorded config; sections that are newer than the run are those of `base`.

    Raises:
      UserError: the workdir has no record, or a damaged one.
    """
    if not workdir:
        raise UserError("configs/workdir.py: name a workdir (configs/workdir.py:runs/digits)")
    record = run_file.read(Path(workdir), "--workdir", "name the --config of this run")
    return ConfigDict({**base.get_config().to_dict(), **_tuples(record["config"])})


def _tuples(value: Any) -> Any:
    """JSON has lists in place of tuples."""
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
