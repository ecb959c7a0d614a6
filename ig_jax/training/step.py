"""The training step: gradients, optimizer, averages, compiled over several steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from ig_jax import optim, prng, pytree
from ig_jax.experiment import Experiment
from ig_jax.models import trunk
from ig_jax.monitoring import throughput
from ig_jax.objectives.base import Draws, Objective
from ig_jax.objectives.metrics import Mean, once
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState, parted, trained
from ig_jax.parallel import collectives
from ig_jax.parallel.mesh import over_batch, replicated
from ig_jax.types import NONE, Abstract, Batch, Labels, Latents, Params

Metrics = Mapping[str, Mean]  # those of k steps have a first axis [k]


class Noised(NamedTuple):
    """Inputs of the loss of a batch, beside parameters; rows of examples."""

    x0: Latents | Abstract
    labels: Labels | Abstract
    draws: Draws | Abstract
    mirrored: Latents | Abstract | None = None  # of the mirror images, where a term reads them


# (what is trained, batch, averaged network, updates done, the rest of the network) -> gradients of
# the mean loss, metrics
Gradients = Callable[[Params, Noised, Params, Array, Params], tuple[Params, Metrics]]


def init_state(exp: Experiment) -> TrainState:
    """A fresh state, made in shards on the devices where they stay: nowhere is it whole."""
    placed = jax.tree.map(lambda x: x.sharding, exp.abstract_state)
    return jax.jit(exp.fresh_state, out_shardings=placed)()


def gradients(
    params: Params,
    batch: Noised,
    teacher: Params | None = None,
    step: Array | int = 0,
    frozen: Params = NONE,
    *,
    objective: Objective,
    parts: int = 1,
) -> tuple[Params, Metrics]:
    """Gradient of the mean loss over a batch, in `parts` passes one after the other.

    Args:
      params: all that is trained (`train_state.trained`).
      batch, teacher, step, frozen: see `Objective.__call__`.
    """

    def grad(piece: Noised) -> tuple[Params, Metrics]:
        differentiate = jax.value_and_grad(objective, has_aux=True)
        *rows, mirrored = piece
        (_, metrics), grads = differentiate(params, *rows, teacher, step, frozen, mirrored)
        return grads, metrics

    if parts == 1:
        return grad(batch)

    def add(total: Any, piece: Noised) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(piece)), None

    pieces = pytree.cut(batch, parts)
    shapes = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = lax.scan(add, zeros, pieces)
    grads, metrics = total
    return jax.tree.map(lambda x: x / parts, grads), metrics


def update_state(
    state: TrainState,
    batch: Noised,
    *,
    gradients: Gradients,
    optimizer: optax.GradientTransformation,
    teacher_decay: float,
    warmup_power: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on a batch with its randomness: gradient, clip, update, averages.

    The teacher of the terms that want one is the average of `teacher_decay` before this step.
    """
    params, frozen = state.trained, state.frozen
    decay = ema.name(teacher_decay)
    teacher = trained(state.ema[decay], state.ema_terms)
    grads, metrics = gradients(params, batch, teacher, state.step, frozen)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    net, terms = parted(optax.apply_updates(params, updates))
    moved = partial(ema.update, step=state.step, warmup_power=warmup_power)
    averages = moved(state.ema, net)
    heads = moved({decay: state.ema_terms}, state.averaged_parts(terms))[decay]
    metrics = {**metrics, "grad_norm": once(optim.gradient_norm(grads))}
    if isinstance(opt_state, optim.SpikeState):
        made = opt_state.skipped == state.opt_state.skipped
        averages, heads = jax.tree.map(
            lambda new, old: jnp.where(made, new, old),
            (averages, heads),
            (state.ema, state.ema_terms),
        )
        metrics[throughput.SKIPPED] = once((~made).astype(jnp.float32))
    return state.replace(
        step=state.step + 1,
        params={**frozen, **net},
        opt_state=opt_state,
        ema=averages,
        terms=terms,
        ema_terms=heads,
    ), metrics


def noise(
    exp: Experiment,
    batch: Batch,
    step: Array | int,
    encoder: Params = NONE,
    seed: Array | int | None = None,
) -> Noised:
    """Latents of a batch, and its randomness at (seed, step); for the rest see `train_step`."""
    seed, stored = exp.config.seed if seed is None else seed, batch["stored"]
    codec, key = exp.config.data.codec, prng.key(seed, "codec", step)
    x0, mirrored = codec.latent(stored, key, encoder), None
    if exp.objective.mirrors:
        others = ~codec.turned(key, len(stored))
        mirrored = codec.latent(stored, prng.key(seed, "mirrored", step), encoder, others)
    draws = exp.objective.draw(prng.key(seed, "train", step), x0)
    return Noised(x0, batch["label"], draws, mirrored)


def train_step(
    state: TrainState,
    batch: Batch,
    encoder: Params = NONE,
    seed: Array | int | None = None,
    *,
    exp: Experiment,
) -> tuple[TrainState, Metrics]:
    """Makes latents of a batch, draws its randomness at (seed, step), and updates.

    Args:
      encoder: what the codec needs to encode images; {} where latents are stored.
      seed: uint32; None: that of the run.
    """
    parts = exp.config.train.accumulation
    of_rows = partial(gradients, objective=exp.split_objective, parts=parts)
    return update_state(
        state,
        noise(exp, batch, state.step, encoder, seed),
        gradients=collectives.over_devices(of_rows, exp.mesh, exp.axes),
        optimizer=exp.optimizer,
        teacher_decay=exp.teacher_decay,
        warmup_power=exp.config.train.ema_warmup_power,
    )


# (state, batches [k, b, ...], encoder) -> the state k steps later, metrics [k] each
Dispatch = Callable[[TrainState, Batch, Params], tuple[TrainState, Metrics]]


def make_dispatch(exp: Experiment) -> Dispatch:
    """The compiled program of the run."""

    def dispatch(state: TrainState, batches: Batch, encoder: Params) -> tuple[TrainState, Metrics]:
        return lax.scan(lambda s, b: train_step(s, b, encoder, exp=exp), state, batches)

    return _compiled(dispatch, exp)


def _compiled(dispatch: Callable[..., Any], exp: Experiment, *more: Any) -> Callable[..., Any]:
    """`more`: places of the arguments behind those that every dispatch takes."""
    whole = replicated(exp.mesh)
    placed = jax.tree.map(lambda x: x.sharding, exp.abstract_state)
    return trunk.jit(
        dispatch,
        in_shardings=(placed, over_batch(exp.mesh, axis=1), whole, *more),
        out_shardings=(placed, whole),
        donate_argnums=0,
    )


class Programs(NamedTuple):
    """The compiled programs of a run."""

    init: Callable[[], TrainState]
    dispatch: Dispatch


class SeededPrograms:
    """The compiled programs of runs that differ in their seed alone: it is an argument of them."""

    def __init__(self, exp: Experiment):
        """`exp`: of any of the seeds."""
        self._whole = replicated(exp.mesh)
        placed = jax.tree.map(lambda x: x.sharding, exp.abstract_state)
        self.init = jax.jit(exp.fresh_state, in_shardings=self._whole, out_shardings=placed)

        def dispatch(
            state: TrainState, batches: Batch, encoder: Params, seed: Array
        ) -> tuple[TrainState, Metrics]:
            return lax.scan(lambda s, b: train_step(s, b, encoder, seed, exp=exp), state, batches)

        self.dispatch = _compiled(dispatch, exp, self._whole)

    def of_seed(self, seed: int) -> Programs:
        placed = jax.device_put(np.uint32(seed), self._whole)

        def dispatch(
            state: TrainState, batches: Batch, encoder: Params
        ) -> tuple[TrainState, Metrics]:
            return self.dispatch(state, batches, encoder, placed)

        return Programs(lambda: self.init(placed), dispatch)
