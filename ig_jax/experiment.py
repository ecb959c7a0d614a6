"""From a parsed config to the objects of a run."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ig_jax import prng
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.codecs import CODECS
from ig_jax.config.parser import make, named
from ig_jax.config.run_config import Config, parse
from ig_jax.errors import UserError, shown
from ig_jax.models import MODELS
from ig_jax.models.axes import Axes, of_heads
from ig_jax.models.network import Network
from ig_jax.models.transformer import data_of
from ig_jax.monitoring import flops
from ig_jax.objectives.base import Objective
from ig_jax.optim import OPTIMIZERS, ema, skip_spikes
from ig_jax.optim.train_state import AVERAGED_HEADS, HEADS_OF_TERMS, TrainState, trained
from ig_jax.parallel import collectives, partitioning
from ig_jax.parallel.mesh import local_mesh, make_mesh, replicate_locally, replicated
from ig_jax.pipeline import Pipeline
from ig_jax.types import DTYPES, Codec, Params


@dataclass(frozen=True)
class Experiment:
    """A config and what it builds. Nothing here touches a device until a program does."""

    config: Config
    mesh: Mesh

    @cached_property
    def local_mesh(self) -> Mesh:
        """This process's devices side by side: for what needs no other process."""
        return local_mesh(self.mesh)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The network with all that sampling needs; its parameters are abstract."""
        c = self.config
        return Pipeline(
            net=self.net,
            params=self.abstract_params,
            process=c.process,
            codec=c.data.codec,
            num_classes=self.num_classes,
            sampling=c.sample,
            mesh=self.mesh,
            has_null_class=c.objective.label_drop > 0,
        )

    @cached_property
    def net(self) -> Network:
        name = self.config.raw["model"]["name"]
        _, network = MODELS[name]
        side, _, channels = self.config.latent_shape
        return network(self.config.model, side, channels, self.num_classes)

    @cached_property
    def axes(self) -> Axes:
        """Names of the axes of everything that is trained or averaged, by dotted path."""
        averaged = self.objective.averaged(self.abstract_terms)
        heads = {HEADS_OF_TERMS: self.abstract_terms, AVERAGED_HEADS: averaged}
        return {**self.net.axes, **of_heads(heads)}

    @property
    def num_classes(self) -> int:
        return self.config.data.source.num_classes

    @cached_property
    def objective(self) -> Objective:
        """Of the network as it is; inside `collectives.over_devices` use `split_objective`."""
        return Objective(
            net=self.net,
            process=self.config.process,
            terms=self.config.objective.terms,
            label_drop=self.config.objective.label_drop,
            groups=self.config.objective.groups,
            null_class=self.num_classes,
            dtype=DTYPES[self.config.model.dtype],
            steps_per_epoch=self.config.train.steps_per_epoch(len(self.config.data.source)),
        )

    @property
    def teacher_decay(self) -> float:
        """Decay of the average that terms of the loss compare with."""
        return self.config.objective.teacher_decay or self.config.train.ema_decays[0]

    @cached_property
    def split_objective(self) -> Objective:
        """As `objective`, for parameters that devices share."""
        dtype = DTYPES[self.config.model.dtype]
        gather = collectives.gather(self.mesh, self.axes, self.abstract_params, dtype)
        heads = collectives.gather_terms(self.mesh, self.axes, self.abstract_terms)
        net, rows = replace(self.net, gather=gather), collectives.batch_rows(self.mesh)
        return replace(self.objective, net=net, gather=heads, rows=rows)

    @cached_property
    def encoder_weights(self) -> Params:
        """Parameters of the codec's encoder, on the host; {} where latents are stored."""
        data = self.config.data
        return data.codec.encoder_weights(data.source.stored_shape)

    @cached_property
    def total_steps(self) -> int:
        return self.config.train.total_steps(len(self.config.data.source))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        _, build = OPTIMIZERS[self.config.raw["optim"]["name"]]
        share = collectives.share_out(self.mesh, self.axes)
        optimizer = build(self.config.optim, self.total_steps, share)
        factor = self.config.train.spike_factor
        return skip_spikes(optimizer, factor) if factor else optimizer

    @cached_property
    def abstract_params(self) -> Params:
        """Shapes and dtypes of the network's parameters."""
        return self.net.abstract_params

    @cached_property
    def abstract_terms(self) -> Params:
        """Shapes and dtypes of the heads that loss terms train, by term; {} without any."""
        return jax.eval_shape(self.objective.init, jax.random.key(0))

    def gradient_flops(self, images: int) -> int:
        """FLOPs of the gradient of the objective on so many images, on paper."""
        objective, terms = self.objective, self.abstract_terms
        return flops.of_train_step(
            self.net,
            self.abstract_params,
            images,
            terms,
            objective.teacher_passes,
            trunk=self.config.train.only is None,
            pooled=[name for name in terms if objective.terms[name].pooled],
            averaged=objective.averaged(terms),
        )

    def fresh_state(self, seed: jax.Array | None = None) -> TrainState:
        """A state of step 0, as a pure function; of the run's own seed where none is given."""
        key = prng.key(self.config.seed if seed is None else seed, "init")
        return self._state(self.net.init(key), self.objective.init(key))

    def _state(self, params: Params, terms: Params) -> TrainState:
        """The state of step 0 with these parameters."""
        averages = ema.init(params, self.config.train.averages)
        only = self.config.train.only
        opt_state = self.optimizer.init(trained(params, terms, only))
        heads = jax.tree.map(jnp.copy, self.objective.averaged(terms))
        return TrainState(jnp.int32(0), params, opt_state, averages, terms, only, heads)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and places of everything that a step changes.

        Raises:
          UserError: a parameter cannot be split as the mesh asks.
        """
        state = jax.eval_shape(self._state, self.abstract_params, self.abstract_terms)
        return partitioning.abstract(self.mesh, self.axes, state)

    @property
    def replicated_params(self) -> Params:
        """As `abstract_params`, whole on every device of `mesh`: to be read from a checkpoint."""
        placed = replicated(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), self.abstract_params
        )


@dataclass(frozen=True)
class _DataCodec:
    """The section `data` without its source."""

    codec: Codec = named(CODECS)


def open_pipeline(
    checkpoints: Checkpoints, step: int, weights: str, field: str, devices: Any = None
) -> Pipeline:
    """The network of a checkpoint, without its data set, which may lie on another machine.

    Args:
      checkpoints: of a run.
      step: of the checkpoint.
      weights: `ema` (the first decay), `raw`, a decay, or a length (`sigma_rel_0.08`).
      field: names `weights` in messages.
      devices: all if None.

    Raises:
      UserError: there are no such weights.
    """
    exp = of_checkpoint(checkpoints, step, devices)
    train, known = exp.config.train, ("ema", "raw", *exp.config.train.averages)
    if weights not in known and not (isinstance(weights, str) and train.has_average(weights)):
        raise UserError(f"{field} = {shown(weights)}: must be one of {', '.join(known)}")
    params = checkpoints.weights(step, weights, exp.replicated_params)
    codec = checkpoints.meta(step)["config"]["data"]["codec"]
    return replace(
        exp.pipeline,
        params=replicate_locally(exp.mesh, params),
        codec=make(_DataCodec, {"codec": codec}, "data").codec,
    )


def open_run(workdir: Path, weights: str, step: int | None, field: str) -> Pipeline:
    """As `open_pipeline`, of a workdir: its newest whole checkpoint, or that of a step.

    `field`: names the workdir in messages.
    """
    with closing(checkpoint_manager.of_run(workdir, field)) as checkpoints:
        if step is None:
            return checkpoints.newest(
                lambda newest: open_pipeline(checkpoints, newest, weights, "weights"),
                checkpoint_manager.WEIGHTS,
            )[1]
        checkpoints.require_step(step, "step")
        return open_pipeline(checkpoints, step, weights, "weights")


def of_checkpoint(checkpoints: Checkpoints, step: int, devices: Any = None) -> Experiment:
    """The run that made a checkpoint, on made-up latents.

    What the network has to know of the data is read off its parameters.
    """
    raw = checkpoints.meta(step)["config"]
    side, channels, classes = data_of(checkpoints.param_shapes(step))
    shape = {"side": side, "channels": channels, "num_classes": classes, "size": 1}
    source = {"name": "synthetic", **shape}
    data = {"source": source, "codec": {"name": "as_stored"}}
    raw.pop("mesh", None)  # of the devices that there were
    return experiment(parse(ConfigDict({**raw, "data": data})), devices)


def experiment(config: Config, devices: Any = None) -> Experiment:
    """The run of `config` on all devices, or on the given ones."""
    devices = list(jax.devices() if devices is None else devices)
    return Experiment(config, make_mesh(devices, config.mesh.shape(len(devices))))
