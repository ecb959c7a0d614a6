"""Optimizers. A new one: a file with its settings and what builds it, and a row here."""

from ig_jax.optim.adamw import AdamWSettings, adamw
from ig_jax.optim.matrix_axes import is_fixed
from ig_jax.optim.muon import MuonSettings, muon
from ig_jax.optim.schedules import SCHEDULES, learning_rate
from ig_jax.optim.spikes import SpikeState, skip_spikes
from ig_jax.optim.trainable import gradient_norm

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "AdamWSettings",
    "MuonSettings",
    "SpikeState",
    "adamw",
    "gradient_norm",
    "is_fixed",
    "learning_rate",
    "muon",
    "skip_spikes",
]

# Name -> (settings, what builds the transformation from them, the number of steps, and a `Share`).
OPTIMIZERS = {"adamw": (AdamWSettings, adamw), "muon": (MuonSettings, muon)}
