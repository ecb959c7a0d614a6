"""From a parsed config to the objects of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ig_jax import sharding
from ig_jax.checkpoint import Checkpoints
from ig_jax.config import Config, parse
from ig_jax.models import MODELS
from ig_jax.models.transformer import data_of
from ig_jax.objectives.base import Objective
from ig_jax.optim import OPTIMIZERS
from ig_jax.types import NetFn, Params


@dataclass(frozen=True)
class Experiment:
    """A config and what it builds. Nothing here touches a device until a program does."""

    config: Config
    mesh: Mesh

    @cached_property
    def net(self) -> NetFn:
        name = self.config.raw["model"]["name"]
        _, network = MODELS[name]
        side, _, channels = self.config.latent_shape
        return network(self.config.model, side, channels, self.num_classes)

    @property
    def num_classes(self) -> int:
        return self.config.data.source.num_classes

    @cached_property
    def objective(self) -> Objective:
        return Objective(
            net=self.net,
            process=self.config.process,
            terms=self.config.objective.terms,
            label_drop=self.config.objective.label_drop,
            null_class=self.num_classes,
        )

    @cached_property
    def encoder_weights(self) -> Params:
        """What the codec needs to encode pictures, on the host; {} where latents are stored."""
        data = self.config.data
        return data.codec.encoder_weights(data.source.stored_shape)

    @cached_property
    def total_steps(self) -> int:
        return self.config.train.total_steps(len(self.config.data.source))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        _, build = OPTIMIZERS[self.config.raw["optim"]["name"]]
        return build(self.config.optim, self.total_steps)

    @cached_property
    def abstract_params(self) -> Params:
        """Shapes and dtypes of the network's parameters."""
        return jax.eval_shape(self.net.init, jax.random.key(0))


def of_checkpoint(checkpoints: Checkpoints, step: int, devices: Any = None) -> Experiment:
    """The run that made a checkpoint, without its data, which may lie on another machine.

    What the network has to know of the data is read off its parameters.
    """
    raw = checkpoints.meta(step)["config"]
    side, channels, classes = data_of(checkpoints.param_shapes(step))
    shape = {"side": side, "channels": channels, "num_classes": classes, "size": 1}
    source = {"name": "synthetic", **shape}
    data = {"source": source, "codec": {"name": "as_stored"}}
    return experiment(parse(ConfigDict(raw | {"data": data})), devices)


def experiment(config: Config, devices: Any = None) -> Experiment:
    """The run of `config` on all devices, or on the given ones."""
    return Experiment(config, sharding.make_mesh(devices))
