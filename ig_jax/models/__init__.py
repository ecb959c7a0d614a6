"""Networks. A new one: a file with its settings and its module, and a row here."""

from functools import partial

from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.sit import SiT, SiTSettings

# Name -> (settings class, function of settings, side, channels and classes that gives a `Network`).
MODELS = {
    "sit": (SiTSettings, partial(Network, SiT)),
    "dit": (SiTSettings, partial(Network, DiT)),
    "lightningdit": (LightningDiTSettings, partial(Network, LightningDiT)),
}
