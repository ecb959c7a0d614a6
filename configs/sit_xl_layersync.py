"""SiT-XL/2 + LayerSync on ImageNet 256 (arXiv 2510.12581): block 8 learns from block 16.

  python main.py --config=configs/sit_xl_layersync.py

Reproduces: no published row; weight and blocks are the published ones, the rest is the recipe of
SiT-XL/2 without readouts, for 80 epochs. Sampled with random labels, no CFG and no IG.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 46 GPU hours.
"""

from ml_collections import ConfigDict

from configs import sit_xl


def get_config(source: str = "") -> ConfigDict:
    c = sit_xl.without_readouts("XL", epochs=80.0, source=source)
    c.objective.terms.layersync = ConfigDict({"weight": 0.2, "depth": 8, "target_depth": 16})
    return c
