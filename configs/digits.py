"""The demo: a tiny SiT, or LightningDiT, with Internal Guidance on scikit-learn's 8x8 digits.

  python main.py --config=configs/digits.py --mode=demo
  python main.py --config=configs/digits.py:no_readout --mode=demo      # SiT alone, without IG
  python main.py --config=configs/digits.py:lightningdit --mode=demo    # trained with Muon
  python main.py --config=configs/digits.py:accelerated --mode=demo     # SiT, guided while training
  python main.py --config=configs/digits.py:layersync --mode=demo       # SiT, block 2 learns from 4
  python main.py --config=configs/digits.py:sra2 --mode=demo            # SiT, block 2 learns x_0
  python main.py --config=configs/digits.py:dispersive --mode=demo      # SiT, images driven apart
  python main.py --config=configs/digits.py:contrastive --mode=demo     # SiT, images told apart
  python main.py --config=configs/digits.py:sra --mode=demo             # SiT, 2 learns from EMA's 4
  python main.py --config=configs/digits.py:dts --mode=demo             # and tokens in two groups
  python main.py --config=configs/digits.py:self_flow --mode=demo       # at two times each image
  python main.py --config=configs/digits.py:self_conditioning --mode=demo  # 3 conditions 4 to 6
  python main.py --config=configs/digits.py:dit --mode=demo             # DiT, 50 ancestral steps

Two CPU cores, a few minutes. README.md shows the tables that these made.
"""

from ml_collections import ConfigDict

from configs import base, lightningdit_xl, sit_dts_xl

VARIANTS = (
    *("sit", "no_readout", "lightningdit", "accelerated", "layersync", "sra2"),
    *("dispersive", "contrastive", "sra", "dts", "self_flow", "self_conditioning", "dit"),
)


def get_config(variant: str = "sit") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f":{variant} is no variant of this config; known: {', '.join(VARIANTS)}")
    c = sit()
    if variant == "no_readout":
        c.model.readouts = ()
        del c.objective.terms.internal_guidance
        c.sample.ig = base.guidance(1.0)
    if variant == "accelerated":
        del c.objective.terms.flow
        c.objective.terms.accelerated_flow = ConfigDict(
            {"weight": 1.0, "omega": 0.5, "bias": "network"}
        )
        # It has learnt what IG 2 would extrapolate to.
        c.sample.ig = base.guidance(1.0)
    if variant == "layersync":
        c.objective.terms.layersync = ConfigDict({"weight": 0.2, "depth": 2, "target_depth": 4})
    if variant == "sra2":
        c.objective.terms.sra2 = ConfigDict({"weight": 1.0, "depth": 2})
    if variant == "dispersive":
        c.objective.terms.dispersive = ConfigDict(
            {"weight": 0.5, "depth": 2, "tau": 0.5, "group_size": 16}
        )
    if variant == "contrastive":
        # A mirrored digit is no digit: the teacher sees the same image, at other noise.
        c.objective.terms.contrastive = ConfigDict(
            {"weight": 0.1, "depth": 3, "view": "same", "hidden_size": 128, "features": 64}
        )
    if variant in ("sra", "dts", "self_flow"):
        c.objective.terms.self_alignment = ConfigDict(
            {
                "weight": 0.5,
                "depth": 2,
                "teacher_depth": 4,
                "max_interval": 0.2,
                "distance": "cosine_tokens",
                "teacher_time": "sra",
                "teacher_groups": True,
                "teacher_labels": "dropped",
            }
        )
    if variant in ("dts", "self_flow"):
        c.objective.groups.shares = (0.25, 0.75)
        c.objective.groups.dual_time = True
        c.objective.groups.separate_attention = True
        c.objective.terms.self_alignment.teacher_labels = "given"
    if variant == "self_flow":
        sit_dts_xl.self_flow(c)
    if variant == "self_conditioning":
        c.model.self_conditioning = base.self_conditioning()
    if variant == "dit":
        dit(c)
    if variant == "lightningdit":
        lightningdit_xl.lightningdit(c)
        c.optim.learning_rate = 3e-3
        c.optim.ns_dtype = "float32"  # as fast as bfloat16 on a CPU
        c.optim.warmup_steps = 50
    return c


def dit(c: ConfigDict) -> None:
    """A DiT on its own process, with its learned variance, in place of the SiT of `c`."""
    c.model.name = "dit"
    c.model.time_scale = 1.0  # it is told the step, 0 to 999
    c.process = ConfigDict({"name": "ddpm"})
    c.objective.terms.variational_bound = ConfigDict({"weight": 1.0})
    c.sample.sampler = ConfigDict(
        {"name": "ancestral", "num_steps": 50, "spacing": "even", "clip_denoised": True}
    )


def sit() -> ConfigDict:
    c = base.get_config()
    c.model.depth = 6
    c.model.hidden_size = 64
    c.model.num_heads = 4
    c.model.readouts = (2,)
    c.model.time_scale = 1000.0
    # Blocks this small are faster without a loop, and still compile quickly.
    c.model.unroll = 6

    c.optim.learning_rate = 3e-3
    c.optim.b2 = 0.95
    c.optim.warmup_steps = 50

    c.train.steps = 2000
    c.train.batch_size = 32
    c.train.steps_per_dispatch = 20
    c.train.ema_decays = (0.995,)

    c.checkpoint.every_steps = 500
    c.checkpoint.keep_every_steps = 0
    c.log.every_steps = 100
    c.log.samples_every_steps = 500

    c.sample.num = 100
    c.sample.batch_size = 480
    c.sample.labels = "balanced"
    c.sample.sampler = ConfigDict({"name": "euler", "num_steps": 20})
    c.sample.ig = base.guidance(2.0)
    c.sample.cfg = base.guidance(1.2)

    c.evaluate.num = 1440
    c.evaluate.seeds = (0, 1, 2)
    c.evaluate.features = ConfigDict({"name": "classifier"})
    c.probe.flip = False  # mirrored digits are none
    # Few images make few steps.
    c.probe.norm = "batch"
    c.probe.epochs = 30.0
    c.probe.learning_rate = 1e-2
    c.search.metric = "fd"
    c.search.num = 480
    c.search.space.values = ConfigDict(
        {"ig": {"scale": (1.0, 1.5, 2.0, 2.5, 3.0)}, "cfg": {"scale": (1.0, 1.1, 1.2)}}
    )
    return c
