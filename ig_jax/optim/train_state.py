"""Everything that a training step changes."""

from __future__ import annotations

import jax
import optax
from flax import struct

from ig_jax.optim.ema import Averages
from ig_jax.types import Abstract, Params


@struct.dataclass
class TrainState:
    """Everything a training step changes. No key: randomness is addressed by (seed, step)."""

    step: jax.Array | Abstract  # int32, updates done
    params: Params
    opt_state: optax.OptState | None  # None: imported weights, that no optimizer has seen
    ema: Averages | None  # None: imported weights, which are averages already
