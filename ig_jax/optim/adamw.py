"""AdamW (arXiv 1711.05101): p <- p - lr (m / (sqrt(v) + eps) + weight_decay p)."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from ig_jax.optim import schedules, trainable
from ig_jax.optim.trainable import Share, alone


@dataclass(frozen=True)
class AdamWSettings(schedules.Settings):
    """AdamW with clipping by the norm over all trained parameters."""


def adamw(s: AdamWSettings, total_steps: int, share: Share = alone) -> optax.GradientTransformation:
    """AdamW on every trained leaf; fixed ones get no update. It needs no leaf whole."""
    del share
    optimizer = optax.adamw(
        schedules.learning_rate(s, total_steps),
        b1=s.b1,
        b2=s.b2,
        eps=s.eps,
        weight_decay=s.weight_decay,
    )
    return trainable.trained_only(optimizer, s.clip_norm)
