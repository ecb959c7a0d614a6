"""SiT-XL/2 + Self-Flow on ImageNet 256 (arXiv 2603.06507), trained as SRA's authors do.

  python main.py --config=configs/sit_self_flow_xl.py

A quarter of each image's tokens have a time of their own; the teacher sees the whole image at the
earlier of the two. Self-Flow's own training code is not released.

Reproduces: "Self-Flow, 4M iterations" of arXiv 2607.02508: FID 1.47 with random labels, CFG 1.8 on
[0, 0.7] (the released code's defaults: the row's own are not stated) and IG 1.0 (off).

Expected, by FLOPs at 45 % of an H100's peak and not measured: 570 GPU hours for 4 000 000 steps.
"""

from ml_collections import ConfigDict

from configs import sit_dts_xl


def get_config(source: str = "") -> ConfigDict:
    c = sit_dts_xl.get_config(source)
    sit_dts_xl.self_flow(c)
    return c
