"""SiT-L/2 + Internal Guidance on ImageNet 256.

  python main.py --config=configs/sit_l.py

Reproduces: no published row. The curve of "SiT-L/2 + IG" in arXiv 2512.24176 ends at FID 8.5 (read
off the plot) after 80 epochs without CFG, at an IG scale that is not published. This config samples
as SiT-XL does: random labels, CFG 1.35 on [0, 0.7], IG 1.4; `--config.sample.cfg.scale=1` for none.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 31 GPU hours for 80 epochs.
"""

from ml_collections import ConfigDict

from configs import sit_xl


def get_config(source: str = "") -> ConfigDict:
    return sit_xl.sized("L", readout=8, epochs=80.0, source=source)
