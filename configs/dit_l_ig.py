"""DiT-L/2 + Internal Guidance on ImageNet 256: the readout predicts noise, as the network does.

  python main.py --config=configs/dit_l_ig.py

Reproduces: no published row. The curve of "DiT-L/2 + IG" in arXiv 2512.24176 ends at FID 10.9 (read
off the plot; 23.3 without IG) after 400 000 steps (80 epochs) without CFG, at an IG scale, labels
and a readout's depth that are not published. This config reads at depth 8 and samples with random
labels, no CFG and IG 1.4, as SiT-XL/2's.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 31 GPU hours.
"""

from ml_collections import ConfigDict

from configs import base, dit_xl


def get_config(source: str = "") -> ConfigDict:
    c = dit_xl.sized("L", readout=8, source=source)
    c.sample.ig = base.guidance(1.4)
    return c
