"""Networks. A new one: a file with its settings and its class, and a row here."""

from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.sit import SiT, SiTSettings

MODELS = {
    "sit": (SiTSettings, SiT),
    "dit": (SiTSettings, DiT),
    "lightningdit": (LightningDiTSettings, LightningDiT),
}
