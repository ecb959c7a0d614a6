"""SiT-XL/2 + Self-Representation Alignment on ImageNet 512: latents of 64 x 64.

  python main.py --config=configs/sit_sra_xl_512.py

Reproduces: "SiT-XL/2 + SRA, 400 epochs" at 512 pixels of arXiv 2505.02831: FID 2.07 with random
labels, CFG 2.5 on [0, 0.7] and IG 1.0 (off); after 200 epochs (`--config.train.epochs=200`) FID
2.17.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 1300 GPU hours for 400 epochs.
"""

from ml_collections import ConfigDict

from configs import sampling, sit_sra_xl


def get_config(source: str = "") -> ConfigDict:
    c = sit_sra_xl.aligned("XL", 8, 20, epochs=400.0, source=source, pixels=512)
    c.sample.update(sampling.sit_xl_sra_512())
    return c
