"""SiT-B/2 + contrastive self-distillation on ImageNet 256 (DDAE++, arXiv 2505.10999): our reading.

  python main.py --config=configs/sit_b_contrastive.py

Reproduces: no published row. DDAE++ shows the loss on other backbones, and its authors have
published neither code nor settings of it. Samples have random labels and no guidance (CFG off, IG
1.0), as those of configs/sit_b_dispersive.py. `--config.objective.terms.contrastive.weight=0` is
the run without the term, for comparison.

The term tells images apart by their mean token after block 6. The layouts of SD-VAE's latents hold
no flipped copies: the teacher sees the latent turned left to right, which is nearly that of the
mirror image; from images (`:image_folder`, `:tfds_images`) that of the mirror image itself.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 10 GPU hours.
"""

from ml_collections import ConfigDict

from configs import sit_xl


def get_config(source: str = "") -> ConfigDict:
    c = sit_xl.without_readouts("B", epochs=80.0, source=source)
    c.objective.terms.contrastive = ConfigDict(
        {
            "weight": 0.1,
            "depth": 6,
            "tau": 0.2,
            "teacher_time": 0.1,
            "view": "mirrored",
            "hidden_size": 1536,  # twice the network's
            "features": 256,
        }
    )
    return c
