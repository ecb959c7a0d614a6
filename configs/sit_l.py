"""SiT-L/2 + Internal Guidance on ImageNet 256.

  python main.py --config=configs/sit_l.py

Reproduces: the curve of "SiT-L/2 + IG" in arXiv 2512.24176: FID 8.5 at 80 epochs without CFG. How
it was sampled is not published; the settings are those of SiT-XL.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 31 GPU hours for 80 epochs.
"""

from ml_collections import ConfigDict

from configs import sit_xl


def get_config(source: str = "") -> ConfigDict:
    return sit_xl.sized("L", readout=8, epochs=80.0, source=source)
