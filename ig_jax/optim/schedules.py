"""The settings that every optimizer has, and the learning rate they make of an update's number."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from ig_jax.bounds import BELOW_ONE, below_one
from ig_jax.errors import shown

# Name -> schedule from the peak over the given number of steps.
SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
}


@dataclass(frozen=True)
class Settings:
    """Settings that optimizers share; their own classes say what they do with them, and add more.

    Raises:
      ValueError: a field is out of range.
    """

    learning_rate: float  # peak
    b1: float
    b2: float
    eps: float
    weight_decay: float  # decoupled, multiplied by the learning rate
    clip_norm: float  # of the gradient over all trained parameters; 0 is off
    warmup_steps: int  # linear, from 0
    # After warm-up: constant, cosine, linear (both to 0 at the last step).
    schedule: str

    def __post_init__(self):
        for field, holds, rule in self.rules():
            if not holds:
                raise ValueError(f"{field} = {shown(getattr(self, field))}: {rule}")

    def rules(self) -> list[tuple[str, bool, str]]:
        """(field, whether its rule holds, the rule)."""
        return [
            ("learning_rate", self.learning_rate > 0, "must be above 0"),
            ("b1", below_one(self.b1), BELOW_ONE),
            ("b2", below_one(self.b2), BELOW_ONE),
            ("eps", self.eps > 0, "must be above 0"),
            ("weight_decay", self.weight_decay >= 0, "must not be negative"),
            ("clip_norm", self.clip_norm >= 0, "must not be negative (0 turns clipping off)"),
            ("warmup_steps", self.warmup_steps >= 0, "must not be negative"),
            ("schedule", self.schedule in SCHEDULES, f"must be one of {', '.join(SCHEDULES)}"),
        ]


def learning_rate(s: Settings, total_steps: int) -> optax.Schedule:
    """Update count -> learning rate. The first update of a warm-up already moves."""
    after = SCHEDULES[s.schedule](s.learning_rate, max(total_steps - s.warmup_steps, 1))
    if not s.warmup_steps:
        return after
    first = s.learning_rate / s.warmup_steps
    warmup = optax.linear_schedule(first, s.learning_rate, max(s.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [s.warmup_steps])
