"""The state that a run goes on from: of its own checkpoint, or of what somebody imported."""

from __future__ import annotations

from ig_jax.checkpoint import compatibility
from ig_jax.checkpoint.manager import CheckpointError, Checkpoints
from ig_jax.experiment import Experiment
from ig_jax.monitoring import console
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState
from ig_jax.training import resume_changes
from ig_jax.training.step import init_state


def restore(exp: Experiment, checkpoints: Checkpoints, step: int) -> tuple[TrainState, int]:
    """The state of a checkpoint, and how many examples it has seen.

    Raises:
      CheckpointError: it was made under settings that this run does not go on from.
    """
    if step == 0:
        return _from_import(exp, checkpoints), 0
    fix = (
        "use its settings, or train another run from its weights: --workdir=NEW "
        f"--init_from={checkpoints.workdir}"
    )
    checkpoints.require(step, exp.config.raw, compatibility.CONTINUES, fix)
    meta = checkpoints.meta(step)
    config, examples = meta["config"], meta["data"]["examples"]
    resume_changes.require_length(exp, config, step, examples)
    like, (average, *_) = exp.abstract_state, exp.abstract_state.ema.values()
    before = {name: average for name in ema.in_config(config["train"])}
    state = checkpoints.restore(step, like.replace(ema=before))
    state = state.replace(ema=ema.chosen(state.ema, exp.config.train.averages))
    for line in resume_changes.describe_changes(exp, config, step):
        console.say(line)
    return state, examples


def _from_import(exp: Experiment, checkpoints: Checkpoints) -> TrainState:
    """The state of step 0 with what somebody imported: weights, or an optimizer's state too.

    Nothing was trained under its settings, so all but the network may differ from them, and with an
    optimizer's state all but what that depends on. Each average starts from the imported one.
    """
    c, like, workdir = exp.config, exp.abstract_state, checkpoints.workdir
    checkpoints.require(0, c.raw, compatibility.SAMPLES)
    average = checkpoints.weights(0, "ema", like.params)
    averages = ema.init(average, c.train.averages)
    if checkpoints.imported(0) != "state":
        console.say(f"starting from the weights in {workdir}")
        state, held = init_state(exp), checkpoints.heads(0)
        if held and set(held) <= like.terms.keys():
            heads = checkpoints.terms(0, {name: like.terms[name] for name in held})
            state = state.replace(terms={**state.terms, **heads})
        return state.replace(params=average, ema=averages)
    fix = "use those of its optimizer, or import the weights without --training_state"
    checkpoints.require(0, c.raw, compatibility.UPDATES, fix)
    held = checkpoints.heads(0)
    if set(held) != exp.abstract_terms.keys():
        raise CheckpointError(
            f"objective.terms: train heads of {', '.join(exp.abstract_terms) or 'none'}, but the "
            f"imported optimizer's state covers {', '.join(held) or 'none'}: train those, or "
            "import the weights without --training_state"
        )
    console.say(f"starting from the weights and the optimizer's state in {workdir}")
    return checkpoints.restore(0, like.replace(ema=None)).replace(ema=averages)
