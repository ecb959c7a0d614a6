"""--mode=replay: the step at which a loss stopped being a number, again, operation by operation.

From the newest checkpoint before it, steps are computed as training did; the step itself without
compilation, so that the first operation that gives no number can be named.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax import pytree
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.data import loader
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors, files
from ig_jax.monitoring import console
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState, trained
from ig_jax.parallel.mesh import replicate_locally, replicated, to_global
from ig_jax.training import step as training_step
from ig_jax.training import trainer
from ig_jax.training.restore import restore

_PACKAGE = str(Path(__file__).resolve().parents[1])


def _failure(workdir: Path) -> dict[str, Any]:
    file = workdir / trainer.FAILURE
    if not file.exists():
        raise UserError(f"--workdir={workdir}: holds no {trainer.FAILURE}; nothing failed here")
    match files.read_json(file):
        case {"step": int(step), "loss": str()} as failure if step > 0:
            return failure
    raise UserError(f"{file}: does not say which step failed; train on, and it is noted again")


def _state_before(exp: Experiment, workdir: Path, step: int) -> tuple[TrainState, int, int]:
    """The newest state before `step`, its step and the number of its next batch."""
    checkpoints = checkpoint_manager.Checkpoints(workdir, reading=True)
    try:
        older = [earlier for earlier in checkpoints.all_steps() if earlier < step]
        if not older:
            return training_step.init_state(exp), 0, 0
        state, start = restore(exp, checkpoints, older[-1])
        return state, older[-1], start
    finally:
        checkpoints.close()


def _advance(exp: Experiment, state: TrainState, data: Any, steps: int) -> TrainState:
    """So many steps as training computes them."""
    encoder = jax.device_put(exp.encoder_weights, replicated(exp.mesh))
    dispatch, size = training_step.make_dispatch(exp), exp.config.train.batch_size
    with console.progress(steps, unit="step", what="replaying") as bar:
        for _ in range(steps):
            rows = {name: array[None] for name, array in next(data).items()}
            state, _ = dispatch(state, to_global(rows, exp.mesh, size, axis=1), encoder)
            bar.update(1)
    return state


def _not_finite(params: Any) -> list[str]:
    return [name for name, x in pytree.flatten(params).items() if not np.all(np.isfinite(x))]


def _look(exp: Experiment, state: TrainState, batch: dict[str, np.ndarray]) -> str:
    """Computes loss and gradients eagerly on one device; reports what is not a number first."""
    # Not debug_infs: masked attention computes with infinities on purpose.
    with jax.disable_jit(), jax.debug_nans(True):
        try:
            rows = {name: jax.numpy.asarray(array) for name, array in batch.items()}
            noised = training_step.noise(exp, rows, state.step, exp.encoder_weights)
            gradients = partial(training_step.gradients, objective=exp.objective)
            teacher = trained(state.ema[ema.name(exp.teacher_decay)], state.ema_terms)
            _, metrics = gradients(state.trained, noised, teacher, state.step, state.frozen)
        except FloatingPointError as error:
            return _where(error)
    loss = float(metrics["loss"].value)
    if np.isinf(loss):
        return (
            "no operation gives nan, but the loss overflows: outputs of the network are too large"
        )
    return f"every operation of it gives numbers here, and the loss is {loss}"


def _where(error: FloatingPointError) -> str:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(_PACKAGE)]
    place = f"{Path(ours[-1].filename).relative_to(_PACKAGE)}:{ours[-1].lineno}, {ours[-1].line}"
    return f"{str(error).splitlines()[0]} (called from ig_jax/{place})"


def run(exp: Experiment, workdir: Path) -> str:
    """Says what went wrong at the step that `workdir` noted; changes nothing there.

    Raises:
      UserError: no failure is noted; the checkpoint is another model's.
    """
    with disk_errors.reported(workdir):
        return _replay(exp, workdir, _failure(workdir))


def _replay(exp: Experiment, workdir: Path, failure: Mapping[str, Any]) -> str:
    step, c = failure["step"], exp.config
    state, done, start = _state_before(exp, workdir, step)
    data = loader.batches(c.data.source, c.train.batch_size, c.seed, start=start)
    console.say(f"step {step}, loss {failure['loss']}: going there from step {done}")
    state = _advance(exp, state, data, step - 1 - done)
    state = jax.tree.map(lambda x: x.addressable_data(0), replicate_locally(exp.mesh, state))
    broken = _not_finite(trained(state.params, state.terms))
    if broken:
        found = (
            f"{len(broken)} parameters are not finite before it, {broken[0]} among them: the "
            f"update of step {step - 1} was too large; lower optim.learning_rate"
        )
    else:
        found = _look(exp, state, next(data))
    console.say(f"step {step}: {found}")
    return found
