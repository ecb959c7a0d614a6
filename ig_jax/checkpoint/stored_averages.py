"""Power-function averages that training stores beside the checkpoints.

`averages/` holds those of `train.ema_sigma_rel` at every `checkpoint.averages_every_steps`, nothing
else of the state; --mode=ema composes others of them. They outlive the checkpoints of their steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ig_jax.checkpoint import composed_average
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState
from ig_jax.parallel.processes import barrier

FOLDER = "averages"
_ALL = 10**9


def opened(workdir: Path, *, reading: bool = False) -> Checkpoints:
    """The stored averages of a run, as checkpoints without other items."""
    return Checkpoints(workdir, keep_last=_ALL, reading=reading, folder=FOLDER)


class StoredAverages:
    """Those of a run that trains."""

    def __init__(self, workdir: Path, step: int):
        """Forgets what was stored or composed of steps later than `step`, where the run goes on."""
        self._stored = opened(workdir)
        for later in self._stored.all_steps():
            if later > step:
                self._stored.remove(later)
        if jax.process_index() == 0:
            composed_average.forget_after(workdir, step)
        barrier("averages of later steps are forgotten")

    def save(self, state: TrainState, seen: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """As `Checkpoints.save`, of the power-function averages alone."""
        kept = {name: x for name, x in state.ema.items() if ema.length(name) is not None}
        rest = {"params": None, "opt_state": None, "terms": {}, "ema_terms": {}}
        self._stored.save(state.replace(ema=kept, **rest), seen, config)

    def close(self) -> None:
        self._stored.close()
