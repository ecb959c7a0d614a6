"""SiT-B/2 + Internal Guidance on ImageNet 256: the paper's ablation.

  python main.py --config=configs/sit_b.py

Reproduces: arXiv 2512.24176, ablation of SiT-B/2 at 80 epochs (400 000 steps), readout at depth 4:
FID 16.19 with IG 2.3 on [0.3, 1) and no CFG; 30.60 without guidance (`--config.sample.ig.scale=1`).
The paper does not say how labels are drawn: random here, as the released sampler does.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 9 GPU hours.
"""

from ml_collections import ConfigDict

from configs import sampling, sit_xl


def get_config(source: str = "") -> ConfigDict:
    c = sit_xl.sized("B", readout=4, epochs=80.0, source=source)
    c.sample.update(sampling.sit_b_ig_ablation())
    return c
