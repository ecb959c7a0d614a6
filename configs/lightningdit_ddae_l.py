"""LightningDiT-L/1 + self-conditioning on ImageNet 256: a reading of DDAE++ (arXiv 2505.10999).

  python main.py --config=configs/lightningdit_ddae_l.py
  python main.py --config=configs/lightningdit_ddae_l.py:unconditional

Reproduces: no published row; the authors show this size as curves alone. The recipe and variants of
configs/lightningdit_ddae_b.py: random labels, or for `:unconditional` the null class; CFG and IG
off.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 39 GPU hours, unconditional 155.
"""

from ml_collections import ConfigDict

from configs import lightningdit_ddae_b


def get_config(variant: str = "") -> ConfigDict:
    return lightningdit_ddae_b.sized("L", variant)
