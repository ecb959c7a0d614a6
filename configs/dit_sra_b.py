"""DiT-B/2 + Self-Representation Alignment on ImageNet 256: block 3 learns from block 8.

  python main.py --config=configs/dit_sra_b.py

Reproduces: arXiv 2505.02831, DiT-B/2 after 400 000 steps (80 epochs) by 250 ancestral steps, no
guidance (CFG off, IG 1.0): FID 39.8, and 43.9 without the term. How labels are drawn is not stated:
random here.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 11 GPU hours.
"""

from ml_collections import ConfigDict

from configs import dit_sra_xl


def get_config(source: str = "") -> ConfigDict:
    return dit_sra_xl.aligned("B", 3, 8, source=source)
