"""The toy with an answer: a tree-shaped density in the plane, learnt by a tiny SiT.

  python main.py --config=configs/tree.py --mode=demo

A point is a 1x1 "image" of two channels; the exact density of
`ig_jax/data/sources/tree_density.py` tells how many samples are outliers: below the density's 1 %
quantile. Under two minutes on two CPU cores.
README.md shows the image that this made.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.depth = 4
    c.model.hidden_size = 64
    c.model.num_heads = 1  # of one token there is nothing to attend to
    c.model.patch_size = 1
    c.model.readouts = (1,)
    c.model.time_scale = 1000.0
    c.model.unroll = 4

    c.data.source = ConfigDict({"name": "tree", "split": "train"})
    c.data.codec = ConfigDict({"name": "as_stored"})

    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 50
    c.optim.schedule = "cosine"

    c.train.steps = 6000
    c.train.batch_size = 256
    c.train.steps_per_dispatch = 50
    c.train.ema_decays = (0.995,)

    c.checkpoint.every_steps = 2000
    c.checkpoint.keep_every_steps = 0
    c.log.samples_every_steps = 0  # points are no images

    c.sample.batch_size = 4000
    c.sample.labels = "balanced"
    c.sample.sampler = ConfigDict({"name": "heun", "num_steps": 32})
    c.sample.ig = base.guidance(1.5)
    c.sample.cfg = base.guidance(1.5)

    c.evaluate.num = 4000
    c.evaluate.seeds = (0, 1, 2)
    c.search.metric = "outliers"
    c.search.num = 4000
    return c
