"""LightningDiT-L/1 + Internal Guidance on ImageNet 256, trained with Muon.

  python main.py --config=configs/lightningdit_l.py

Reproduces: no published row; the recipe of LightningDiT-XL/1 + IG (arXiv 2512.24176) at the size of
the paper's SiT-L, with its readout depth, for 80 epochs. Sampled as LightningDiT-XL is: random
labels, CFG 1.45 on [0, 0.81], IG 1.4.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 34 GPU hours.
"""

from ml_collections import ConfigDict

from configs import lightningdit_xl


def get_config(source: str = "") -> ConfigDict:
    return lightningdit_xl.sized("L", readout=8, epochs=80.0, source=source)
