"""Training: a pure step, and a loop that keeps devices busy, reports what happens, and resumes.

The loop dispatches a program of several steps, and only then looks at the metrics of the one
before: the host never waits for the newest result. Which steps share a program depends on the step
number alone, so that a resumed run computes bit for bit what an unbroken one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from ig_jax import optim
from ig_jax.checkpoint import run_file, stored_averages
from ig_jax.checkpoint.manager import ARRAY_ITEMS, HEAD_ITEMS, Checkpoints
from ig_jax.data import loader
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors, files
from ig_jax.monitoring import console, metric_writer, profiler, throughput
from ig_jax.monitoring.throughput import NonFiniteLoss
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState
from ig_jax.parallel import lock
from ig_jax.parallel.mesh import local_rows, replicated, to_global, to_host
from ig_jax.parallel.preemption import StopSignal
from ig_jax.plots.losses import plot_losses
from ig_jax.training import init_from as init_from_run
from ig_jax.training.evaluations import Evaluations
from ig_jax.training.restore import restore
from ig_jax.training.step import Metrics, Programs, init_state, make_dispatch

FAILURE = "not_finite.json"  # the step at which a loss was no number
MUCH = 0.05  # of the initial weights in an average, at the end


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


@dataclass(frozen=True)
class Outcome:
    """Outcome of a training run; its last step is saved."""

    state: TrainState
    step: int
    finished: bool
    stopped_by: str | None  # the signal that asked for it, even if the run was just finished
    seconds: Mapping[str, float]  # compile, train


def rates(exp: Experiment) -> throughput.Rates:
    """Converts seconds a step of this experiment to FLOP/s and their share of the peak."""
    log, count = exp.config.log, exp.gradient_flops(exp.config.train.batch_size)
    return throughput.Rates(
        count / exp.mesh.size,
        exp.mesh.devices.flat[0].device_kind,
        peak_tflops=log.peak_tflops,
    )


class Trainer:
    """One run in one workdir: the loop's state, and what happens at which step."""

    def __init__(
        self,
        exp: Experiment,
        workdir: Path,
        require_workdir: Callable[[], None] = lambda: None,
        init_from: str | None = None,
        programs: Programs | None = None,
    ):
        """
        Args:
          require_workdir: raises where the workdir is not this run's any more; asked before
            anything is written to it.
          init_from: WORKDIR[@STEP] of the run whose weights this one starts from.
          programs: those of the run, where there are any already.
        """
        c = exp.config
        self._require_workdir = require_workdir
        self._init, self.dispatch = programs or (partial(init_state, exp), make_dispatch(exp))
        self.exp, self.workdir = exp, workdir
        self.checkpoints = Checkpoints(
            workdir,
            keep_last=c.checkpoint.keep_last,
            keep_every_steps=c.checkpoint.keep_every_steps,
        )
        begun = self.checkpoints.latest_step() is not None
        self._averages: stored_averages.StoredAverages | None = None
        self._source = init_from_run.chosen(workdir, init_from, begun=begun)
        self.step, self.state = self._begin()
        self._began_at = self._logged_at = self.step
        if c.checkpoint.averages_every_steps:
            self._averages = stored_averages.StoredAverages(workdir, self.step)
        self._record()
        self.data = loader.batches(
            c.data.source,
            c.train.batch_size,
            c.seed,
            start=self._seen_at_start,
            rows=local_rows(exp.mesh, c.train.batch_size),
        )
        console.say_data(c.data.source)
        if c.train.batch_size > len(c.data.source):
            console.say(
                f"train.batch_size = {c.train.batch_size}: a batch holds some of the "
                f"{len(c.data.source):,} examples more than once"
            )
        if not self.step:
            self._warn_of_averages()
        self.encoder = jax.device_put(exp.encoder_weights, replicated(exp.mesh))
        self.writer = metric_writer.MetricWriter(workdir, resumed_at=self.step)
        self.evaluations = Evaluations(exp, workdir, self.writer)
        self.writer.settings(c.raw, ("loss", *self.evaluations.metrics))
        self.rates, self.window = rates(exp), throughput.Window()
        self._learning_rate = optim.learning_rate(c.optim, exp.total_steps)
        self.profile = profiler.Profile(
            workdir / "profile", start=self.step + c.profile.start, steps=c.profile.steps
        )
        self.pending: tuple[int, Metrics] | None = None
        self.seconds = {"compile": 0.0, "train": 0.0}
        self._compiled: set[int] = set()

    def _begin(self) -> tuple[int, TrainState]:
        """The newest readable checkpoint's state, or a fresh one."""
        if self.checkpoints.latest_step() is None:
            self._seen_at_start = 0
            state = self._fresh()
            overview = parameter_overview.get_parameter_overview(state.trained, include_stats=False)
            if jax.process_index() == 0:
                files.write_text(self.workdir / "parameters.txt", overview + "\n")
            return 0, state
        heads = [name for name in HEAD_ITEMS if getattr(self.exp.abstract_state, name)]
        step, (state, self._seen_at_start) = self.checkpoints.newest(
            partial(restore, self.exp, self.checkpoints), (*ARRAY_ITEMS, *heads)
        )
        if step:
            console.say(f"resuming {self.workdir} at step {step}")
        return step, state

    def _seen(self, step: int) -> int:
        """Examples in the batches of all steps up to this one."""
        return self._seen_at_start + (step - self._began_at) * self.exp.config.train.batch_size

    def _warn_of_averages(self) -> None:
        """Says which averages will still hold much of the initial weights at the end."""
        train, steps = self.exp.config.train, self.exp.total_steps
        for decay in train.ema_decays:
            share = ema.share_of_initial(decay, steps, train.ema_warmup_power)
            if share > MUCH:
                console.say(
                    f"train.ema_decays: after {steps:,} steps {share:.0%} of the average of "
                    f"{decay:g} are the initial weights; lower it, or set "
                    "train.ema_warmup_power = 0.67"
                )

    def _fresh(self) -> TrainState:
        """The state of step 0: of fresh weights, or of another run's."""
        only = self.exp.config.train.only
        if self._source is not None:
            state, step = init_from_run.start(self.exp, self._source)
            self._source = {**self._source, "step": step}
            return state
        if only is not None:
            raise UserError(
                f"train.only = {only!r}: trains {only} of a network that is trained already; name "
                f"its run with {init_from_run.FLAG}=WORKDIR"
            )
        return self._init()

    def _record(self) -> None:
        """Writes what makes this run: resolved config, versions, command line."""
        if jax.process_index() == 0:
            raw, source = self.exp.config.raw, self._source
            made_under = self.checkpoints.meta(self.step)["config"] if self.step else None
            run_file.write(self.workdir, raw, source, self.step, made_under)

    def _advance(self, steps: int, bar: Any) -> None:
        """Dispatches `steps` steps, then takes in the metrics of the dispatch before."""
        started, new = time.perf_counter(), steps not in self._compiled
        if new:
            bar.set_postfix_str("compiling")
        with self.window.measure("data"):
            rows = [next(self.data) for _ in range(steps)]
            stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
        size = self.exp.config.train.batch_size
        batches = to_global(stacked, self.exp.mesh, size, axis=1)
        before = self.step
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.dispatch(self.state, batches, self.encoder)
        self.step += steps
        if new:
            bar.set_postfix_str("")
            self._compiled.add(steps)
            seconds = time.perf_counter() - started
            self.seconds["compile"] += seconds
            self.window.leave_out(seconds)
            console.leave_out(bar, seconds)
        self._settle()
        self.pending = (before, metrics)

    def _settle(self) -> None:
        """Waits for the metrics that are still out, and checks them."""
        if self.pending is not None:
            first, metrics = self.pending
            self.pending = None
            self.window.add(first, jax.tree.map(to_host, metrics))

    def _save(self) -> None:
        self._settle()  # a state with a loss that is not finite is never saved
        if self.step == self.checkpoints.latest_step():
            return
        self._require_workdir()
        with self.window.measure("checkpoint"):
            seen = {"examples": self._seen(self.step)}
            self.checkpoints.save(self.state, seen, self.exp.config.raw)

    def _save_averages(self) -> None:
        self._settle()
        self._require_workdir()
        with self.window.measure("checkpoint"):
            seen = {"examples": self._seen(self.step)}
            self._averages.save(self.state, seen, self.exp.config.raw)

    def _log(self, bar: Any) -> None:
        self._settle()
        batch_size = self.exp.config.train.batch_size
        summary = self.window.summary(batch_size, self.rates)
        summary["learning_rate"] = float(self._learning_rate(self.step - 1))
        self._require_workdir()
        self.writer.scalars(self.step, {"images": self._seen(self.step), **summary})
        bar.set_postfix(self._shown(summary), refresh=False)
        skipped = summary.get(throughput.SKIPPED)
        if skipped:
            console.say(f"step {self.step}: {skipped} updates skipped, their gradients were spikes")
        self.window, self._logged_at = throughput.Window(), self.step

    def _shown(self, summary: Mapping[str, Any]) -> dict[str, str]:
        """Values that stand beside the bar."""
        shown = {"loss": f"{summary['loss']:.4f}", "img/s": f"{summary['images_per_second']:,.0f}"}
        if "mfu" in summary:
            shown["MFU"] = f"{summary['mfu']:.0%}"
        return shown | {"GiB": f"{summary['memory_gib']:.1f}"}

    def _events(self) -> dict[str, int]:
        """Event -> every how many steps it happens."""
        c = self.exp.config
        every = {"log": c.log.every_steps, "save": c.checkpoint.every_steps}
        if c.checkpoint.averages_every_steps:
            every["averages"] = c.checkpoint.averages_every_steps
        return every | self.evaluations.every

    def _handle(self, due: set[str], bar: Any) -> None:
        if "log" in due:
            self._log(bar)
        if "save" in due:
            self._save()
        if "averages" in due:
            self._save_averages()
        evaluated = due & self.evaluations.every.keys()
        if evaluated:
            started = time.perf_counter()
            self.evaluations.compute(evaluated, self.state, self.step, self._seen(self.step))
            seconds = time.perf_counter() - started
            self.window.leave_out(seconds)
            console.leave_out(bar, seconds)

    def run(self) -> Outcome:
        """Trains to the end, or until a signal asks to stop; both save."""
        total, events = self.exp.total_steps, self._events()
        started = time.perf_counter()
        with (
            StopSignal() as stop,
            console.progress(total, initial=self.step, unit="step", what="training") as bar,
        ):
            while self.step < total and not stop.before(self.step):
                self.profile.before(self.step)
                holds = [_next_multiple(self.step, n) for n in events.values()]
                per_dispatch = self.exp.config.train.steps_per_dispatch
                steps = steps_until(self.step, per_dispatch, total, *holds)
                self._advance(steps, bar)
                bar.update(steps)
                self._handle({what for what, n in events.items() if self.step % n == 0}, bar)
            if self.step >= total and self.step > self._logged_at:
                self._log(bar)  # the last steps, however few
            self._save()
            self.checkpoints.wait()
        self.profile.close()
        self.seconds["train"] = time.perf_counter() - started - self.seconds["compile"]
        return Outcome(self.state, self.step, self.step >= total, stop.received, self.seconds)

    def note_failure(self, error: NonFiniteLoss) -> None:
        """Writes down which step and which examples --mode=replay has to look at."""
        c = self.exp.config
        seen = self._seen(error.step - 1)
        examples = loader.indices(c.data.source, c.train.batch_size, c.seed, seen)
        record = {"step": error.step, "loss": str(error.loss)}
        if jax.process_index() == 0:
            record["examples"] = examples.tolist()
            files.write_json(self.workdir / FAILURE, record)

    def close(self) -> None:
        self.writer.close()
        if self._averages:
            self._averages.close()
        self.checkpoints.close()


def run(
    exp: Experiment,
    workdir: Path,
    init_from: str | None = None,
    programs: Programs | None = None,
) -> Outcome:
    """Trains in `workdir`, going on from its newest checkpoint if there is one.

    `init_from`, `programs`: as for `Trainer`.

    Returns:
      How it ended. SIGTERM and Ctrl-C, where this is the main thread, end it early: `stopped_by`
      names them, and the caller has to heed it.

    Raises:
      UserError: another program works in the workdir, or it holds another model's run; a loss is
        not finite; the data set is empty; the disk is full or gone.
    """
    with lock.held(workdir) as held:
        return train(exp, workdir, held, init_from, programs)


def train(
    exp: Experiment,
    workdir: Path,
    held: lock.Held,
    init_from: str | None = None,
    programs: Programs | None = None,
) -> Outcome:
    """As `run`, for who holds the workdir's lock."""
    with disk_errors.reported(workdir):
        outcome = _train(Trainer(exp, workdir, held.require, init_from, programs))
    if outcome.finished:
        console.say(f"trained: step {outcome.step} of {exp.total_steps} is saved in {workdir}")
    else:
        console.say(
            f"{outcome.stopped_by}: saved step {outcome.step} of {exp.total_steps} in {workdir}; "
            "run the same command again to go on"
        )
    return outcome


def draw_losses(workdir: Path) -> None:
    """Writes loss.png, where there is a line of metrics and room on the disk."""
    lines = metric_writer.read_metrics(workdir)
    if lines and jax.process_index() == 0:
        with console.room_or_not("loss.png", workdir):
            plot_losses(lines, workdir / "loss.png")


def _train(trainer: Trainer) -> Outcome:
    try:
        outcome = trainer.run()
    except BaseException as error:
        if isinstance(error, NonFiniteLoss):
            trainer.note_failure(error)
        with suppress(Exception):  # the first error is the one to be reported
            trainer.close()
        raise
    trainer.close()
    return outcome
