"""DiT-XL/2 on ImageNet 256 (arXiv 2212.09748): noise prediction on DDPM's schedule.

  python main.py --config=configs/dit_xl.py

Reproduces: no published row. Only the noise is trained (L_simple): the paper's loss of the learned
variance is not built, nor are its 250 ancestral steps, which use that variance; sampling is along
the ODE, with random labels, CFG 1.5 on three channels and no IG. With imported weights, the network
is the published one, whose row is FID 2.27 with random labels, CFG 1.5 and those ancestral steps.

Expected, by FLOPs at 45 % of an H100's peak and not measured: 800 GPU hours for the paper's 7
million steps of 256.
"""

from ml_collections import ConfigDict

from configs import sampling, sit_xl


def get_config(source: str = "") -> ConfigDict:
    c = sit_xl.sized("XL", readout=8, epochs=None, source=source)
    c.model.name = "dit"
    c.model.readouts = ()
    c.process = ConfigDict({"name": "ddpm"})
    del c.objective.terms.internal_guidance
    c.train.steps = 7_000_000
    c.sample.update(sampling.dit_xl())
    return c
