"""ImageNet as latents, for the configs beside it. For now the latents are made up.

The shapes, the classes and the number of examples are ImageNet's, so that `--dry_run`, memory and
speed are those of the real run; the values are noise around a mean for each class. Reading stored
latents is not built yet.
"""

from ml_collections import ConfigDict

CLASSES, IMAGES = 1000, 1_281_167


def _latents(side: int, channels: int) -> ConfigDict:
    shape = {"side": side, "channels": channels, "num_classes": CLASSES, "size": IMAGES}
    source = {"name": "synthetic", **shape}
    return ConfigDict({"source": source, "codec": {"name": "as_stored"}})


def sd_vae() -> ConfigDict:
    """256-pixel images through the Stable Diffusion autoencoder, f8d4: 32 x 32 x 4."""
    return _latents(32, 4)


def va_vae() -> ConfigDict:
    """256-pixel images through VA-VAE (arXiv 2501.01423), f16d32: 16 x 16 x 32."""
    return _latents(16, 32)
