"""SiT-XL/2 + Self-Representation Alignment on ImageNet 256: block 8 learns from the average's 20.

  python main.py --config=configs/sit_sra_xl.py

Reproduces: "SiT-XL/2 + SRA, 800 epochs" of arXiv 2505.02831: FID 1.58 with random labels, CFG 1.8
on [0, 0.7] and IG 1.0 (off); after 400 epochs (`--config.train.epochs=400`) FID 1.85.

The paper's distance is smooth-L1. Its authors have since found that it can diverge late in long
runs, and made the cosine over tokens the default of their code, at a constant weight:

  T=config.objective.terms.self_alignment
  python main.py --config=configs/sit_sra_xl.py \\
    --$T.distance=cosine_tokens --$T.weight=0.5 --$T.weight_factor=1.0

Expected, by FLOPs at 45 % of an H100's peak and not measured: 570 GPU hours for 800 epochs.
"""

from ml_collections import ConfigDict

from configs import sampling, sit_xl


def get_config(source: str = "") -> ConfigDict:
    c = aligned("XL", 8, 20, epochs=800.0, source=source)
    c.sample.update(sampling.sit_xl_sra())
    return c


def aligned(
    size: str, depth: int, teacher_depth: int, epochs: float, source: str, pixels: int = 256
) -> ConfigDict:
    """The recipe of SiT + SRA at a size of the paper, 256 or 512 pixels, sampled unguided."""
    c = sit_xl.without_readouts(size, epochs=epochs, source=source, pixels=pixels)
    constant_epochs, falling_epochs = {256: (149, 1000), 512: (99, 800)}[pixels]
    c.objective.terms.self_alignment = ConfigDict(
        {
            "weight": 0.2,
            "weight_factor": 0.1 ** (1 / falling_epochs),
            "constant_epochs": constant_epochs,
            "depth": depth,
            "teacher_depth": teacher_depth,
            "max_interval": 0.2,
            "distance": "smooth_l1",
            "beta": 0.05,
        }
    )
    return c
