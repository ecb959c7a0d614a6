"""SiT-B/2 + SRA 2 on ImageNet 256 (arXiv 2601.17830): block 2 predicts the clean latent.

  python main.py --config=configs/sit_b_sra2.py

Reproduces: the paper's SiT-B/2 after 400 000 steps (80 epochs) without guidance (CFG off, IG 1.0):
FID 28.89, and 33.02 without the term (`--config.objective.terms.sra2.weight=0`). How labels are
drawn is not stated: random here. No code is published: ig_jax/objectives/sra2.py says what we read
into the paper.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 10 GPU hours.
"""

from ml_collections import ConfigDict

from configs import sit_xl


def get_config(source: str = "") -> ConfigDict:
    c = sit_xl.without_readouts("B", epochs=80.0, source=source)
    # Depth 8 for L and XL.
    c.objective.terms.sra2 = ConfigDict({"weight": 1.0, "depth": 2})
    return c
