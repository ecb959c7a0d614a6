"""Training: a pure step, and a loop that keeps devices busy, tells what happens, and resumes.

The loop dispatches a program of several steps, and only then looks at the metrics of the one
before: the host never waits for the newest result. Which steps share a program depends on the step
number alone, so that a resumed run computes bit for bit what an unbroken one does.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax import lax
from jaxtyping import Array, Float

from ig_jax import checkpoint, ema, logs, optim, preview, prng, sharding, tree
from ig_jax.build import Experiment
from ig_jax.checkpoint import Checkpoints, TrainState
from ig_jax.data import loader
from ig_jax.errors import UserError
from ig_jax.objectives.base import BY_TIME, Draws, Objective, mean_by_time
from ig_jax.types import NONE, Batch, Labels, Latents, Params

Metrics = Mapping[str, Array]
History = Mapping[str, Float[Array, "k ..."]]  # of k steps


class NonFiniteLoss(UserError):
    """The loss stopped being a number; the last good checkpoint is kept."""


def init_state(exp: Experiment) -> TrainState:
    """A fresh state, made on the devices where it stays."""

    def init() -> TrainState:
        params = exp.net.init(prng.key(exp.config.seed, "init"))
        averages = ema.init(params, exp.config.train.ema_decays)
        return TrainState(jnp.int32(0), params, exp.optimizer.init(params), averages)

    return jax.jit(init, out_shardings=sharding.replicated(exp.mesh))()


def gradients(
    params: Params,
    x0: Latents,
    labels: Labels,
    draws: Draws,
    objective: Objective,
    parts: int,
    teacher: Params | None = None,
) -> tuple[Params, Metrics]:
    """Gradient of the mean loss over a batch, in `parts` passes one after the other."""

    def grad(piece: tuple) -> tuple[Params, Metrics]:
        (_, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params, *piece, teacher)
        return grads, metrics

    if parts == 1:
        return grad((x0, labels, draws))

    def add(total: Any, piece: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(piece)), None

    pieces = tree.cut((x0, labels, draws), parts)
    shapes = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda x: x / parts, total)


def update(
    state: TrainState,
    x0: Latents,
    labels: Labels,
    draws: Draws,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    parts: int = 1,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on latents x0 with given randomness: gradient, clip, update, averages.

    The first average, which sampling uses too, is the teacher of the terms that want one.
    """
    teacher = next(iter(state.ema.values()))
    grads, metrics = gradients(state.params, x0, labels, draws, objective, parts, teacher)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    averages = ema.update(state.ema, params)
    metrics = {**metrics, "grad_norm": optim.gradient_norm(grads)}
    return TrainState(state.step + 1, params, opt_state, averages), metrics


def train_step(
    state: TrainState, batch: Batch, encoder: Params = NONE, *, exp: Experiment
) -> tuple[TrainState, Metrics]:
    """Makes latents of a batch, draws its randomness at (seed, step), and updates.

    `encoder`: what the codec needs to encode pictures; {} where latents are stored.
    """
    c = exp.config
    x0 = c.data.codec.latent(batch["stored"], prng.key(c.seed, "codec", state.step), encoder)
    draws = exp.objective.draw(prng.key(c.seed, "train", state.step), x0)
    return update(
        state,
        x0,
        batch["label"],
        draws,
        objective=exp.objective,
        optimizer=exp.optimizer,
        parts=c.train.accumulation,
    )


def make_dispatch(
    exp: Experiment,
) -> Callable[[TrainState, Batch, Params], tuple[TrainState, History]]:
    """The compiled program: batches [k, b, ...] -> the state k steps later, metrics [k] each."""

    def dispatch(state: TrainState, batches: Batch, encoder: Params) -> tuple[TrainState, History]:
        return lax.scan(lambda s, b: train_step(s, b, encoder, exp=exp), state, batches)

    whole = sharding.replicated(exp.mesh)
    return jax.jit(
        dispatch,
        in_shardings=(whole, sharding.over_batch(exp.mesh, axis=1), whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )


def steps_until(step: int, per_dispatch: int, *events: int) -> int:
    """Steps of the next program: `per_dispatch`, or 1 where an event or the grid is nearer.

    Args:
      step: updates done.
      per_dispatch: preferred length; programs of that length start at its multiples only.
      events: steps, all later than `step`, at which the loop must hold.
    """
    return per_dispatch if step % per_dispatch == 0 and step + per_dispatch <= min(events) else 1


def _next_multiple(step: int, every: int) -> int:
    return (step // every + 1) * every


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag, so that the loop can save; a second one is obeyed."""

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()


@dataclass
class _Window:
    """Metrics since the last line of metrics.jsonl."""

    since: float = field(default_factory=time.perf_counter)
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, first_step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Metrics [k] of steps first_step + 1, ...; raises at the first loss that is not finite."""
        for offset, loss in enumerate(metrics["loss"].tolist()):
            if not math.isfinite(loss):
                raise NonFiniteLoss(
                    f"the loss is {loss} at step {first_step + offset + 1}: stopped; lower "
                    "optim.learning_rate and train in another --workdir; the last good checkpoint "
                    "is kept"
                )
        for name, values in metrics.items():
            self.values[name].extend(values.tolist())

    def summary(self, batch_size: int) -> dict[str, float]:
        steps, seconds = len(self.values["loss"]), time.perf_counter() - self.since
        rates = {
            "steps_per_second": steps / seconds,
            "images_per_second": steps * batch_size / seconds,
        }
        sums = {n: np.sum(v, axis=0) for n, v in self.values.items() if n.startswith(BY_TIME)}
        means = {n: float(np.mean(v)) for n, v in self.values.items() if n not in sums}
        return means | rates | mean_by_time(sums)


@dataclass(frozen=True)
class Outcome:
    """How a training run ended."""

    state: TrainState
    step: int
    finished: bool
    stopped_by: str | None
    seconds: Mapping[str, float]  # compile, train


class Trainer:
    """One run in one workdir: the loop's state, and what happens at which step."""

    def __init__(self, exp: Experiment, workdir: Path):
        c = exp.config
        self.exp, self.workdir = exp, workdir
        self.checkpoints = Checkpoints(
            workdir,
            keep_last=c.checkpoint.keep_last,
            keep_every_steps=c.checkpoint.keep_every_steps,
        )
        self.step, self.state = self._begin()
        self._record()
        self.data = loader.batches(
            c.data.source, c.train.batch_size, c.seed, start=self._data_start
        )
        self.dispatch = make_dispatch(exp)
        self.encoder = jax.device_put(exp.encoder_weights, sharding.replicated(exp.mesh))
        self.writer = logs.MetricWriter(workdir, resumed_at=self.step)
        if c.log.samples_every_steps:  # otherwise its decoder would be read for nothing
            self.preview = preview.Preview(exp, workdir)
        self.window = _Window()
        self.pending: tuple[int, History] | None = None
        self.seconds = {"compile": 0.0, "train": 0.0}
        self._compiled: set[int] = set()

    def _begin(self) -> tuple[int, TrainState]:
        """The newest checkpoint's state, or a fresh one."""
        step = self.checkpoints.latest_step()
        if step is None:
            self._data_start = 0
            state = init_state(self.exp)
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            logs.write_text(self.workdir / "parameters.txt", overview + "\n")
            return 0, state
        if step == 0:
            return 0, self._from_import()
        self.checkpoints.require(step, self.exp.config.raw, checkpoint.CONTINUES)
        like = jax.eval_shape(lambda: init_state(self.exp))
        state = self.checkpoints.restore(step, like, sharding.replicated(self.exp.mesh))
        self._data_start = self.checkpoints.meta(step)["data"]["next_index"]
        logs.say(f"resuming {self.workdir} at step {step}")
        return step, state

    def _from_import(self) -> TrainState:
        """The state of step 0 with what somebody imported: weights, or an optimizer's state too.

        Nothing was trained under its settings, so all but the network may differ from them, and
        with an optimizer's state all but what that depends on. Each average starts from the
        imported one.
        """
        c, placed = self.exp.config, sharding.replicated(self.exp.mesh)
        self.checkpoints.require(0, c.raw, checkpoint.SAMPLES)
        self._data_start = 0
        average = self.checkpoints.weights(0, "ema", self.exp.abstract_params, placed)
        averages = ema.init(average, c.train.ema_decays)
        if self.checkpoints.imported(0) != "state":
            logs.say(f"starting from the weights in {self.workdir}")
            return init_state(self.exp).replace(params=average, ema=averages)
        mend = "use those of its optimizer, or import the weights without --training_state"
        self.checkpoints.require(0, c.raw, checkpoint.UPDATES, mend)
        like = jax.eval_shape(lambda: init_state(self.exp)).replace(ema=None)
        logs.say(f"starting from the weights and the optimizer's state in {self.workdir}")
        return self.checkpoints.restore(0, like, placed).replace(ema=averages)

    def _record(self) -> None:
        """What makes this run: resolved config, versions, command line."""
        if jax.process_index() == 0:
            record = {
                "config": dict(self.exp.config.raw),
                "versions": checkpoint.versions(),
                "command": sys.argv,
            }
            logs.write_json(self.workdir / "config.json", record)

    def _advance(self, steps: int, bar: Any) -> None:
        """Dispatches `steps` steps, then takes in the metrics of the dispatch before."""
        started = time.perf_counter()
        rows = [next(self.data) for _ in range(steps)]
        stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
        batches = sharding.to_global(stacked, self.exp.mesh, axis=1)
        before = self.step
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.dispatch(self.state, batches, self.encoder)
        self.step += steps
        if steps not in self._compiled:
            self._compiled.add(steps)
            seconds = time.perf_counter() - started
            self.seconds["compile"] += seconds
            logs.leave_out(bar, seconds)
        self._settle()
        self.pending = (before, metrics)

    def _settle(self) -> None:
        """Waits for the metrics that are still out, and checks them."""
        if self.pending is not None:
            first, metrics = self.pending
            self.pending = None
            self.window.add(first, {n: sharding.to_host(v) for n, v in metrics.items()})

    def _save(self) -> None:
        self._settle()  # a state with a loss that is not finite is never saved
        if self.step != self.checkpoints.latest_step():
            self.checkpoints.save(self.state, self.data.get_state(), self.exp.config.raw)

    def _log(self, bar: Any) -> None:
        self._settle()
        batch_size = self.exp.config.train.batch_size
        summary = self.window.summary(batch_size)
        self.writer.scalars(self.step, {"images": self.step * batch_size, **summary})
        bar.set_postfix(loss=f"{summary['loss']:.4f}", refresh=False)
        self.window = _Window()

    def _events(self) -> dict[str, int]:
        """What happens every how many steps."""
        c = self.exp.config
        every = {"log": c.log.every_steps, "save": c.checkpoint.every_steps}
        if c.log.samples_every_steps:
            every["preview"] = c.log.samples_every_steps
        return every

    def _handle(self, due: set[str], bar: Any) -> None:
        if "log" in due:
            self._log(bar)
        if "save" in due:
            self._save()
        if "preview" in due:
            weights = self.state.ema[str(self.exp.config.train.ema_decays[0])]
            started = time.perf_counter()
            picture = self.preview.draw(weights, self.step)
            self.writer.images(self.step, "samples", picture)
            self.window.since = time.perf_counter()
            logs.leave_out(bar, time.perf_counter() - started)

    def run(self) -> Outcome:
        """Trains to the end, or until a signal asks to stop; both save."""
        total, events = self.exp.total_steps, self._events()
        started = time.perf_counter()
        with (
            StopSignal() as stop,
            logs.progress(total, initial=self.step, unit="step", what="training") as bar,
        ):
            while self.step < total and not stop.received:
                holds = [_next_multiple(self.step, n) for n in events.values()]
                per_dispatch = self.exp.config.train.steps_per_dispatch
                steps = steps_until(self.step, per_dispatch, total, *holds)
                self._advance(steps, bar)
                bar.update(steps)
                self._handle({what for what, n in events.items() if self.step % n == 0}, bar)
            self._save()
            self.checkpoints.wait()
        self.seconds["train"] = time.perf_counter() - started - self.seconds["compile"]
        return Outcome(self.state, self.step, self.step >= total, stop.received, self.seconds)

    def close(self) -> None:
        self.writer.close()
        self.checkpoints.close()


def run(exp: Experiment, workdir: Path) -> Outcome:
    """Trains in `workdir`, going on from its newest checkpoint if there is one.

    Raises:
      UserError: the workdir holds another model's run; a loss is not finite; the data set is too
      small.
    """
    trainer = Trainer(exp, workdir)
    try:
        outcome = trainer.run()
    finally:
        trainer.close()
    if outcome.finished:
        logs.say(f"trained: step {outcome.step} of {exp.total_steps} is saved in {workdir}")
    else:
        logs.say(
            f"{outcome.stopped_by}: saved step {outcome.step} of {exp.total_steps} in {workdir}; "
            "run the same command again to go on"
        )
    return outcome
