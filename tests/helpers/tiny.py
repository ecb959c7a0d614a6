"""The smallest run that has every part: what the tests of the programs train, sample and judge.

Also a config file for the command line, `--config=tests/helpers/tiny.py`, so that a test can start
the very same run in a process of its own.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import digits
from ig_jax import experiment as build
from ig_jax import modes
from ig_jax.config import run_config
from ig_jax.config.run_config import Config
from ig_jax.experiment import Experiment
from ig_jax.parallel.mesh import replicate_locally
from ig_jax.training import trainer
from ig_jax.types import Params

ROOT = Path(__file__).resolve().parents[2]


def get_config() -> ConfigDict:
    """configs/digits.py made tiny: two blocks, a few steps, a checkpoint now and then."""
    c = digits.get_config()
    c.model.depth = 2
    c.model.hidden_size = 16
    c.model.num_heads = 2
    c.model.readouts = (1,)
    c.model.unroll = 1
    c.optim.warmup_steps = 5
    c.train.steps = 24
    c.train.batch_size = 16
    c.train.steps_per_dispatch = 4
    c.train.ema_decays = (0.9, 0.8)  # the first is not the first by its name
    c.checkpoint.every_steps = 6
    c.log.every_steps = 6
    c.log.samples_every_steps = 0
    c.sample.num = 12
    c.sample.batch_size = 20
    c.sample.sampler.num_steps = 3
    c.evaluate.num = 20
    c.evaluate.seeds = (0, 1)
    return c


def settings(changes: Mapping[str, Any] = {}) -> ConfigDict:
    """The tiny config with fields replaced or added, by dotted name and whatever their type."""
    values = get_config().to_dict()
    for path, value in changes.items():
        *parents, name = path.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[name] = value
    return ConfigDict(values)


def experiment(
    changes: Mapping[str, Any] = {}, devices: Sequence[jax.Device] | None = None
) -> Experiment:
    """The tiny experiment with changes, on all devices or on the given ones."""
    devices = jax.devices() if devices is None else devices
    return build.experiment(run_config.parse(settings(changes), devices=len(devices)), devices)


@dataclass(frozen=True)
class Trained:
    """A finished run. All tests share its workdir, so those that write take a copy."""

    exp: Experiment
    workdir: Path
    outcome: trainer.Outcome

    def weights(self, decay: str | None = None) -> Params:
        """The raw weights, or an average, whole on every device, as sampling wants them."""
        state = self.outcome.state
        return replicate_locally(self.exp.mesh, state.ema[decay] if decay else state.params)

    def copy(self, workdir: Path) -> Path:
        return Path(shutil.copytree(self.workdir, workdir, dirs_exist_ok=True))


@cache
def trained() -> Trained:
    """The tiny run, trained to its end, once a session."""
    workdir = Path(tempfile.mkdtemp(prefix="ig_jax_trained_"))
    atexit.register(shutil.rmtree, workdir, ignore_errors=True)
    return Trained(experiment(), workdir, modes.run(settings(), workdir=str(workdir)))


def made_for(make: Callable[[Config, Mesh], Any], exp: Experiment) -> Any:
    """What `make` makes of a run's config and devices."""
    return make(exp.config, exp.mesh)
