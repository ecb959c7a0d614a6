"""Optimizers. A new one: a file with its settings and what builds it, and a row here."""

from ig_jax.optim.adamw import AdamWSettings, adamw
from ig_jax.optim.assembly import gradient_norm
from ig_jax.optim.leaves import is_fixed
from ig_jax.optim.muon import MuonSettings, muon
from ig_jax.optim.schedules import SCHEDULES, learning_rate

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "AdamWSettings",
    "MuonSettings",
    "adamw",
    "gradient_norm",
    "is_fixed",
    "learning_rate",
    "muon",
]

# Name -> (settings, what builds the transformation from them and the total number of steps).
OPTIMIZERS = {"adamw": (AdamWSettings, adamw), "muon": (MuonSettings, muon)}
