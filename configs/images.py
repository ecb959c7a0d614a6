"""Your own images: a SiT with Internal Guidance on a folder or zip of them.

  python main.py --config=configs/images.py --workdir=runs/mine --config.data.path=FOLDER
  python main.py --config=configs/images.py:64 --workdir=runs/mine --config.data.path=FOLDER
  python main.py --config=configs/images.py:latents --workdir=runs/mine --config.data.path=FOLDER \
      --config.data.codec.weights=weights/sd-vae-ft-ema.safetensors

FOLDER holds images in folders that are their classes, or loose ones of no class; a tenth of each
class is held out. They are cropped to squares of 32 pixels, or of 64; or of 256, which the Stable
Diffusion autoencoder encodes in every step (--mode=prepare would do it once, see docs/imagenet.md).

The network is small, for a laptop; on a GPU raise model.depth, model.hidden_size, model.num_heads,
train.batch_size and train.steps. CFG is off: it needs images of two classes or more. Nothing here
was tuned on a data set.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import base

VARIANTS = ("32", "64", "latents")


def get_config(variant: str = "32") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f":{variant} is no variant of this config; known: {', '.join(VARIANTS)}")
    c = base.get_config()
    c.model.depth = 6
    c.model.hidden_size = 128
    c.model.num_heads = 4
    c.model.readouts = (2,)
    c.model.time_scale = 1000.0  # a small network learns sooner with it
    c.model.unroll = 6

    c.data.path = placeholder(str)
    c.data.source = ConfigDict({"name": "own_images", "size": 32, "held_out_share": 0.1})
    c.data.source.path = c.data.get_ref("path")
    if variant == "latents":
        c.data.source.size = 256
        c.model.patch_size = 2  # of 32 x 32 x 4 latents
        c.data.codec = ConfigDict({"name": "sd_vae", "weights": placeholder(str)})
    else:
        c.data.source.size = int(variant)
        c.model.patch_size = int(variant) // 8  # 64 tokens

    c.objective.terms.internal_guidance.weight = 0.5
    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 100
    c.optim.schedule = "cosine"

    c.train.steps = 4000
    c.train.batch_size = 64
    c.train.steps_per_dispatch = 10
    c.train.ema_decays = (0.998,)  # about the last tenth of the run

    c.checkpoint.every_steps = 500
    c.checkpoint.keep_every_steps = 0
    c.log.every_steps = 50
    c.log.samples_every_steps = 500

    c.sample.labels = "balanced"
    c.sample.sampler = ConfigDict({"name": "heun", "num_steps": 25})
    c.sample.ig = base.guidance(1.5)
    c.sample.cfg = base.guidance(1.0)

    c.evaluate.num = 1000
    c.evaluate.while_training.loss_every_steps = 250
    c.evaluate.features = ConfigDict({"name": "classifier"})
    return c
