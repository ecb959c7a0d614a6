"""Codecs from what is stored to latents to images. A new one: a file, and a row here."""

from ig_jax.codecs.as_stored import AsStored
from ig_jax.codecs.autoencoders import SdVae, VaVae
from ig_jax.codecs.identity import Identity

CODECS = {"identity": Identity, "as_stored": AsStored, "sd_vae": SdVae, "va_vae": VaVae}
