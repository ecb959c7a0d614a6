"""Optimizers, schedules, clipping, and the rule that keeps fixed tables away from them."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from ig_jax import tree
from ig_jax.types import Params, Scalar


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW (arXiv 1711.05101) with clipping by the norm over all trained parameters."""

    learning_rate: float  # peak
    b1: float
    b2: float
    eps: float
    weight_decay: float  # decoupled, multiplied by the learning rate
    clip_norm: float  # 0 is off
    warmup_steps: int  # linear, from 0
    schedule: str  # after warm-up: constant, cosine, linear (both to 0 at the last step)

    def __post_init__(self):
        rules = [
            ("learning_rate", self.learning_rate > 0, "must be above 0"),
            ("b1", 0 <= self.b1 < 1, "must lie in [0, 1)"),
            ("b2", 0 <= self.b2 < 1, "must lie in [0, 1)"),
            ("eps", self.eps > 0, "must be above 0"),
            ("weight_decay", self.weight_decay >= 0, "must not be negative"),
            ("clip_norm", self.clip_norm >= 0, "must not be negative (0 turns clipping off)"),
            ("warmup_steps", self.warmup_steps >= 0, "must not be negative"),
            ("schedule", self.schedule in SCHEDULES, f"must be one of {', '.join(SCHEDULES)}"),
        ]
        for field, holds, rule in rules:
            if not holds:
                raise ValueError(f"{field} = {getattr(self, field)!r}: {rule}")


# Name -> schedule from the peak over the given number of steps.
SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
}


def learning_rate(s: AdamWSettings, total_steps: int) -> optax.Schedule:
    """Update count -> learning rate. The first update of a warm-up already moves."""
    after = SCHEDULES[s.schedule](s.learning_rate, max(total_steps - s.warmup_steps, 1))
    if not s.warmup_steps:
        return after
    first = s.learning_rate / s.warmup_steps
    warmup = optax.linear_schedule(first, s.learning_rate, max(s.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [s.warmup_steps])


def is_fixed(path: str) -> bool:
    """True for leaves that live among the parameters but are never trained: position tables.

    They travel with the parameters because published checkpoints carry tables of their own.
    """
    return path.split(".")[-1] == "pos_embed"


def adamw(s: AdamWSettings, total_steps: int) -> optax.GradientTransformation:
    """The optimizer; fixed leaves get no update and count in no norm."""
    clip = [optax.clip_by_global_norm(s.clip_norm)] if s.clip_norm else []
    trained = optax.chain(
        *clip,
        optax.adamw(
            learning_rate(s, total_steps),
            b1=s.b1,
            b2=s.b2,
            eps=s.eps,
            weight_decay=s.weight_decay,
        ),
    )

    def labels(params: Params) -> Params:
        return tree.map_named(lambda p, _: "fixed" if is_fixed(p) else "trained", params)

    return optax.partition({"trained": trained, "fixed": optax.set_to_zero()}, labels)


def gradient_norm(grads: Params) -> Scalar:
    """Global norm over the trained leaves: what clipping compares with `clip_norm`."""
    return optax.tree.norm({p: g for p, g in tree.flatten(grads).items() if not is_fixed(p)})


# Name -> (settings, what builds the transformation from them and the total number of steps).
OPTIMIZERS = {"adamw": (AdamWSettings, adamw)}
