"""SiT-B/2 + contrastive self-distillation on ImageNet 256 (DDAE++, arXiv 2505.10999): our reading.

  python main.py --config=configs/sit_b_contrastive.py

Reproduces: no published row. DDAE++ shows the loss on other backbones, and its authors have
published neither code nor settings of it. Samples have random labels and no guidance (CFG off, IG
1.0), as those of configs/sit_b_dispersive.py. `--config.objective.terms.contrastive.weight=0` is
the run without the term, for comparison.

The term compares an image with the mean token after block 6. SD-VAE's layouts hold no flipped
copies, so the teacher sees the same latent; from images (`:image_folder`, `:tfds_images`) it can
see the mirror image: `--config.objective.terms.contrastive.view=mirrored`.

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
            "view": "same",
            "hidden_size": 1536,  # twice the network's
            "features": 256,
        }
    )
    return c
