"""DiT-B/2 + Internal Guidance on ImageNet 256: the readout predicts noise, as the network does.

  python main.py --config=configs/dit_b_ig.py

Reproduces: no published row. The curve of "DiT-B/2 + IG" in arXiv 2512.24176 ends at FID 26.9 (read
off the plot; 43.8 without IG) after 400 000 steps (80 epochs) without CFG, at an IG scale, labels
and a readout's depth that are not published. This config reads at depth 4 and samples with random
labels, no CFG and the IG of the ablation of SiT-B/2: 2.3 on [0.3, 1), which in DDPM's time is
[0.13, 1] by the ratio of noise to data.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 9 GPU hours.
"""

from ml_collections import ConfigDict

from configs import base, dit_xl


def get_config(source: str = "") -> ConfigDict:
    c = dit_xl.sized("B", readout=4, source=source)
    c.sample.ig = base.guidance(2.3, low=0.13)
    return c
