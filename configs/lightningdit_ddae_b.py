"""LightningDiT-B/1 + self-conditioning on ImageNet 256: a reading of DDAE++ (arXiv 2505.10999).

  python main.py --config=configs/lightningdit_ddae_b.py
  python main.py --config=configs/lightningdit_ddae_b.py:unconditional
  python main.py --config=configs/lightningdit_ddae_b.py:safetensors_shards,unconditional

Reproduces: the row "+ self-conditioning, 100 epochs" of the authors' README, without guidance (CFG
off, IG 1.0): FID 14.52 of 10,000 samples, and FID 15.51 without self-conditioning
(`configs/lightningdit_ddae_b.py:baseline`). `:unconditional`, where every label is the null class
(labels 1000), after 400 epochs: FID 20.85, and FID 21.26 without (`:unconditional,baseline`).

What that rests on is LightningDiT's recipe (arXiv 2501.01423) on VA-VAE's latents. The authors
published neither code nor equation nor these settings, nor how labels were drawn (random here) or
sampled (as LightningDiT + IG here).

Expected, by FLOPs at 45 % of an H100's peak and not measured: 11 GPU hours, unconditional 44.
"""

from ml_collections import ConfigDict

from configs import base, imagenet, lightningdit_xl

CHOICES = ("unconditional", "baseline")


def get_config(variant: str = "") -> ConfigDict:
    return sized("B", variant)


def sized(size: str, variant: str) -> ConfigDict:
    """A size of LightningDiT; variant: a source of `imagenet`, `CHOICES`, with commas between."""
    words = list(filter(None, variant.split(",")))
    for word in words:
        if word not in (*CHOICES, *imagenet.SOURCES):
            known = ", ".join([*CHOICES, *imagenet.SOURCES])
            raise ValueError(f":{word} is no variant of this config; known: {known}")
    source = [word for word in words if word in imagenet.SOURCES]
    c = lightningdit_xl.sized(size, readout=1, epochs=100.0, source=source[-1] if source else "")
    c.model.readouts = ()
    if "baseline" not in words:
        c.model.self_conditioning = base.self_conditioning()
    del c.objective.terms.internal_guidance
    c.sample.ig, c.sample.cfg = base.guidance(1.0), base.guidance(1.0)
    c.evaluate.num = 10_000
    lightningdit_alone(c)
    if "unconditional" in words:
        c.objective.label_drop = 1.0
        c.sample.labels = str(imagenet.CLASSES)
        c.train.epochs = 400.0
    return c


def lightningdit_alone(c: ConfigDict) -> None:
    """LightningDiT's own training in place of that with Internal Guidance."""
    c.process.time_distribution = "logit_normal"
    c.train.batch_size = 1024
    c.optim = base.get_config().optim
    c.optim.learning_rate = 2e-4
    c.optim.b2 = 0.95
    c.optim.clip_norm = 0.0
