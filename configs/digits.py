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
  python main.py --config=configs/digits.py:study --mode=study          # all of it side by side

Two CPU cores, a few minutes. README.md shows the tables that these made.
"""

from ml_collections import ConfigDict

from configs import base, lightningdit_xl, sit_dts_xl
from ig_jax.study.overrides import difference

VARIANTS = (
    *("sit", "no_readout", "lightningdit", "accelerated", "layersync", "sra2"),
    *("dispersive", "contrastive", "sra", "dts", "self_flow", "self_conditioning", "dit"),
    "study",
)


def get_config(variant: str = "sit") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f":{variant} is no variant of this config; known: {', '.join(VARIANTS)}")
    c = sit()
    if variant in ("no_readout", "study"):
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
    if variant == "sra":
        blocks = {"depth": (1, 2, 3), "teacher_depth": (4, 5)}
        c.select.values = ConfigDict({"objective": {"terms": {"self_alignment": blocks}}})
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
    if variant == "study":
        study(c)
    return c


def study(c: ConfigDict) -> None:
    """What a network can learn from itself, each method alone (docs/study.md).

    A row is an entry of `methods`. The rest of `c` is the SiT without a readout, sampled without
    guidance.
    """
    c.sample.cfg = base.guidance(1.0)
    c.log.samples_every_steps = 0
    c.checkpoint.keep_every_steps = 500  # autoguidance goes back to the first of them
    c.evaluate.num = 1420  # four runs of as many as are held out

    readout = {"model": {"readouts": (2,)}, "objective": {"terms": _readout(0.5)}}
    ig = {"sample": {"ig": {"scale": 2.0}}}
    early = {"sample": {"autoguidance": {"scale": 2.0}, "guide": {"step": 500}}}
    # A readout of a network that is trained already, and stays as it is.
    afterwards = {
        "model": {"readouts": (4,)},
        "objective": {"terms": _readout(0.5)},
        "train": {"only": "readouts", "steps": 500},
        "sample": {"ig": {"scale": 1.2}},
    }
    alone = {name: {"overrides": _change(name)} for name in ALONE}
    c.study.methods = ConfigDict(
        {
            "none": {},
            "readout": {"overrides": readout},
            "ig": {"same_run_as": "readout", "overrides": ig},
            "autoguidance": {"same_run_as": "none", "guide": "none", "overrides": early},
            "acceleration_w03": {"overrides": _acceleration(0.3)},
            "acceleration_w06": {"overrides": _acceleration(0.6)},
            "ig_afterwards": {"init_from": "none", "overrides": afterwards},
            **alone,
        }
    )
    c.study.baseline = "none"
    c.study.measures = ("fd", "precision", "recall", "loss", "probe")
    c.study.probe.blocks = (2, 4)


# Variants that are rows of the study by what they add to the SiT.
ALONE = (
    *("sra", "sra2", "layersync", "dts", "self_flow"),
    *("self_conditioning", "contrastive", "dispersive"),
)


def _change(variant: str) -> dict:
    """What a variant adds to the demo."""
    changes = difference(sit().to_dict(), get_config(variant).to_dict())
    return {section: value for section, value in changes.items() if section != "select"}


def _readout(weight: float) -> dict:
    return {"internal_guidance": {"weight": weight}}


def _acceleration(omega: float) -> dict:
    """As Branch in SGG: arXiv 2603.20584 has omega 0.3 or 0.6, and 0.2 for the readout.

    Its factor (share of training done) ** 0.0001 is left out: 0.999 after the first step.
    """
    accelerated = {"weight": 1.0, "omega": omega, "bias": "network"}
    terms = {"flow": None, "accelerated_flow": accelerated, **_readout(0.2)}
    return {"model": {"readouts": (2,)}, "objective": {"terms": terms}}


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
