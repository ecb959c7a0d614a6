"""ImageNet as latents, for the configs beside it.

Without a folder the latents are made up: shapes, classes and number of examples are ImageNet's, so
that `--dry_run`, memory and speed are those of the real run. With your latents, start from a config
of this folder in one of your own:

  from configs import imagenet, sit_xl

  def get_config():
      c = sit_xl.get_config()
      c.data = imagenet.sd_vae("/data/imagenet256", decoder="/weights/sd-vae-ft-ema.safetensors")
      return c
"""

from ml_collections import ConfigDict

CLASSES, IMAGES = 1000, 1_281_167


def _made_up(side: int, channels: int) -> ConfigDict:
    shape = {"side": side, "channels": channels, "num_classes": CLASSES, "size": IMAGES}
    return ConfigDict({"source": {"name": "synthetic", **shape}, "codec": {"name": "as_stored"}})


def sd_vae(folder: str = "", *, decoder: str = "") -> ConfigDict:
    """256-pixel images through the Stable Diffusion autoencoder, f8d4: 32 x 32 x 4.

    Args:
      folder: holds `vae-sd/` as the tools of REPA, SRA and IG write it; or a zip of it.
      decoder: published diffusion_pytorch_model.safetensors; without it, false colours.
    """
    if not folder:
        return _made_up(32, 4)
    source = {"name": "npy_folder", "path": folder, "num_classes": CLASSES}
    return ConfigDict({"source": source, "codec": {"name": "sd_vae", "decoder": decoder}})


def va_vae(folder: str = "", *, decoder: str = "") -> ConfigDict:
    """256-pixel images through VA-VAE (arXiv 2501.01423), f16d32: 16 x 16 x 32.

    Args:
      folder: holds the `latents_rank*_shard*.safetensors` of LightningDiT and latents_stats.pt.
      decoder: published vavae-imagenet256-f16d32-dinov2.pt; without it, false colours.
    """
    if not folder:
        return _made_up(16, 32)
    source = {"name": "safetensors_shards", "path": folder, "num_classes": CLASSES}
    statistics = f"{folder}/latents_stats.pt"
    codec = {"name": "va_vae", "statistics": statistics, "decoder": decoder}
    return ConfigDict({"source": source, "codec": codec})
