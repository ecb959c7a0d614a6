"""ImageNet for the configs beside it: as latents, as images, or made up.

Without a source the latents are made up: shapes, classes and number of examples are ImageNet's, so
that `--dry_run`, memory and speed are those of the real run. With one, as in

  --config=configs/sit_xl.py:array_record --config.data.source.path=/data/latents

  source              what it reads
  array_record        latents that --mode=prepare wrote
  npy_folder          latents as the tools of REPA, SRA and IG write them (sd_vae)
  safetensors_shards  latents as LightningDiT's tool writes them (va_vae)
  image_folder        images, one folder a class; encoded in every step, or by --mode=prepare
  tfds_images         images as TFDS keeps them, such as imagenet2012/5.1.0
  no_data             none: to sample, and decode with data.codec.weights, where no data lie

Images are cropped to 256 pixels, or to 512 where a config says so. An image folder must hold 1000
classes (or as many as data.source.num_classes says) unless data.source.fewer_classes is True;
without classes the number is 1.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

CLASSES, IMAGES = 1000, 1_281_167
OF_IMAGES = {"image_folder": {"fewer_classes": False}, "tfds_images": {"split": "train"}}
LATENTS = {"array_record": {"split": "train"}, "npy_folder": {}, "safetensors_shards": {}}
SOURCES = (*OF_IMAGES, *LATENTS, "no_data")


def _source(name: str, path: str, pixels: int, *, side: int, channels: int) -> ConfigDict:
    """`side` and `channels`: of latents as they are stored."""
    if name not in SOURCES:
        raise ValueError(f"{name!r} is no source of ImageNet; known: {', '.join(SOURCES)}")
    if name == "no_data":
        return ConfigDict(_synthetic(side, channels))
    fields = {**OF_IMAGES[name], "size": pixels} if name in OF_IMAGES else LATENTS[name]
    return ConfigDict({"name": name, "path": path, "num_classes": CLASSES, **fields})


def _synthetic(side: int, channels: int) -> dict:
    shape = {"side": side, "channels": channels, "num_classes": CLASSES, "size": IMAGES}
    return {"name": "synthetic", **shape}


def _made_up(side: int, channels: int) -> ConfigDict:
    return ConfigDict({"source": _synthetic(side, channels), "codec": {"name": "as_stored"}})


def on(data: ConfigDict, source: str) -> ConfigDict:
    """A source in place of the made-up latents `data` of an imported network.

    Raises:
      ValueError: its latents are those of no published autoencoder.
    """
    codecs = {"sd_vae": (sd_vae, 8), "va_vae": (va_vae, 16)}
    if data.codec.name not in codecs:
        raise ValueError(f"{source!r}: this network's latents are of no published autoencoder")
    of_codec, factor = codecs[data.codec.name]
    found = of_codec(source)
    found.source.num_classes = data.source.num_classes
    if source in OF_IMAGES:
        found.source.size = factor * data.source.side
    if source == "no_data":
        found.source.side = data.source.side
    found.codec.rounding = data.codec.rounding
    return found


def sd_vae(
    source: str = "", path: str = "", *, weights: str | None = None, pixels: int = 256
) -> ConfigDict:
    """Through the Stable Diffusion autoencoder, f8d4: 32 x 32 x 4 of 256 pixels.

    Args:
      source: see the top of this file.
      path: its folder, or zip.
      weights: published diffusion_pytorch_model.safetensors; without it, samples are in false
        colours.
      pixels: side of the images.
    """
    side = pixels // 8
    if not source:
        return _made_up(side, 4)
    data = ConfigDict({"source": _source(source, path, pixels, side=side, channels=8)})
    data.codec = ConfigDict({"name": "sd_vae", "weights": placeholder(str), "dtype": "float32"})
    data.codec.weights = weights
    return data


def va_vae(source: str = "", path: str = "", *, weights: str | None = None) -> ConfigDict:
    """Through VA-VAE (arXiv 2501.01423), f16d32: 16 x 16 x 32.

    Args:
      source, path: as for `sd_vae`; the path also holds latents_stats.pt where it holds latents.
      weights: published vavae-imagenet256-f16d32-dinov2.pt; without it, false colours.
    """
    if not source:
        return _made_up(16, 32)
    data = ConfigDict({"source": _source(source, path, 256, side=16, channels=64)})
    data.codec = ConfigDict({"name": "va_vae", "weights": placeholder(str), "dtype": "float32"})
    data.codec.weights = weights
    data.codec.statistics = placeholder(str)
    if source in LATENTS:
        # Follows the path wherever the command line moves it.
        data.codec.statistics = data.source.get_ref("path") + "/latents_stats.pt"
    return data
