"""Every rule of a config has a sentence of its own: the field, its value, the rule, a way out."""

import re

import pytest
import tiny

from ig_jax.config import run_config
from ig_jax.config.run_config import ConfigError

NO_READOUT = {"model.readouts": (), "sample.ig.scale": 1.0}
DOPRI5 = {"name": "dopri5", "num_steps": 50}
LIGHTNING = {
    "model": {
        **tiny.get_config().model.to_dict(),
        "name": "lightningdit",
        **dict.fromkeys(("swiglu", "rope", "rms_norm", "shift"), True),
    }
}


def made_up(**fields):
    shape = {"side": 32, "channels": 4, "num_classes": 10, "size": 100, **fields}
    return {"data.source": {"name": "synthetic", **shape}, "data.codec": {"name": "as_stored"}}


# (changes, the field and value that the sentence opens with, the rule and way out).
RULES = {
    "seed": ({"seed": -1}, "seed = -1", "must not be negative"),
    "depth": ({"model.depth": 0}, "model.depth = 0", "must be at least 1"),
    "depth_large": ({"model.depth": 2 * 10**9}, "model.depth = 2000000000", "at most 1024"),
    "hidden_0": ({"model.hidden_size": 0}, "model.hidden_size = 0", "above 0"),
    "hidden_negative": ({"model.hidden_size": -16}, "model.hidden_size = -16", "above 0"),
    "hidden_large": ({"model.hidden_size": 2**40}, "model.hidden_size = 1099511627776", "at most"),
    "mlp_of_none": ({"model.mlp_ratio": 1e-9}, "model.mlp_ratio = 1e-09", "an MLP 0 wide, must be"),
    "mlp_large": ({"model.mlp_ratio": 1e9}, "model.mlp_ratio = 1000000000.0", "0 wide, must be 1"),
    "unroll_large": ({"model.unroll": 10**6}, "model.unroll = 1000000", "at most 64"),
    "readouts_many": (
        {"model.depth": 99, "model.readouts": tuple(range(1, 99))},
        r"model.readouts = \(1, 2, .*\)",
        "not name more than 64 depths",
    ),
    "tokens_many": (
        made_up(side=2**14),
        "model.patch_size = 2",
        "67,108,864 tokens .* more than 134,217,728 numbers; choose a larger patch",
    ),
    "side_large": (made_up(side=10**5), "data.source.side = 100000", "at most 65536"),
    "classes_many": (
        made_up(num_classes=2**31 - 1),
        "data.source.num_classes = 2147483647",
        "at most 16777216",
    ),
    "heads": ({"model.num_heads": 0}, "model.num_heads = 0", "must be at least 1"),
    "patch": ({"model.patch_size": 0}, "model.patch_size = 0", "must be at least 1"),
    "patch_and_side": ({"model.patch_size": 3}, "model.patch_size = 3", "must divide .*8"),
    "hidden_by_4": ({"model.hidden_size": 18}, "model.hidden_size = 18", "divisible by 4"),
    "hidden_by_heads": (
        {"model.num_heads": 3},
        "model.hidden_size = 16",
        "divisible by num_heads = 3; the next that is: 18",
    ),
    "mlp_ratio": ({"model.mlp_ratio": 0.0}, "model.mlp_ratio = 0.0", "above 0"),
    "time_scale": ({"model.time_scale": -1.0}, "model.time_scale = -1.0", "above 0"),
    "dtype": ({"model.dtype": "int8"}, "model.dtype = 'int8'", "float32, bfloat16"),
    "remat": ({"model.remat": "all"}, "model.remat = 'all'", "none, dots, full"),
    "unroll": ({"model.unroll": 0}, "model.unroll = 0", "at least 1"),
    "readout_0": ({"model.readouts": (0,)}, r"model.readouts = \(0,\)", "0 must lie in 1..1"),
    "readout_last": ({"model.readouts": (2,)}, r"model.readouts = \(2,\)", "before the last of de"),
    "readout_deep": ({"model.readouts": (1, 3)}, r"model.readouts = \(1, 3\)", "3 must lie in 1"),
    "readout_twice": ({"model.readouts": (1, 1)}, r"model.readouts = \(1, 1\)", "each depth once"),
    "readout_no_tuple": ({"model.readouts": 1}, "model.readouts = 1", r"a tuple, such as \(1,\)"),
    "readout_word": ({"model.readouts": ("a",)}, "model.readouts = 'a'", "must be of type int"),
    "rope_by_4": (
        {"model": {**LIGHTNING["model"], "num_heads": 8}},
        "model.hidden_size = 16",
        r"a head's 2 channels \(hidden_size / num_heads = 8\) must be divisible by 4",
    ),
    "path": ({"process.path": "arc"}, "process.path = 'arc'", "linear, cosine, vp"),
    "prediction": (
        {"process.prediction": "data"},
        "process.prediction = 'data'",
        "velocity, noise, score",
    ),
    "time_std_0": ({"process.time_std": 0.0}, "process.time_std = 0.0", "above 0"),
    "time_std_negative": ({"process.time_std": -1.0}, "process.time_std = -1.0", "above 0"),
    "times": (
        {"process.time_distribution": "beta"},
        "process.time_distribution = 'beta'",
        "uniform, lognormal, logit_normal",
    ),
    "split": ({"data.source.split": "all"}, "data.source.split = 'all'", "train, held_out"),
    "drop_negative": ({"objective.label_drop": -0.1}, "objective.label_drop = -0.1", r"\[0, 1\]"),
    "drop_large": ({"objective.label_drop": 1.1}, "objective.label_drop = 1.1", r"in \[0, 1\]"),
    "no_terms": ({"objective.terms": {}}, "objective.terms = {}", "at least one of flow, "),
    "term_weight": (
        {"objective.terms.flow.weight": -1.0},
        "objective.terms.flow.weight = -1.0",
        "must not be negative|must be above 0",
    ),
    "omega_1": (
        {"objective.terms.accelerated_flow": {"weight": 1.0, "omega": 1.0, "bias": "ema"}},
        "objective.terms.accelerated_flow.omega = 1.0",
        r"must lie in \[0, 1\); at 1 the target runs away",
    ),
    "bias": (
        {"objective.terms.accelerated_flow": {"weight": 1.0, "omega": 0.5, "bias": "mine"}},
        "objective.terms.accelerated_flow.bias = 'mine'",
        "must be one of network, ema",
    ),
    "acceleration_readout": (
        {
            "objective.terms.accelerated_flow": {
                "weight": 1.0,
                "omega": 0.5,
                "bias": "ema",
                "readout": 2,
            }
        },
        "objective.terms.accelerated_flow: readout = 2",
        r"one of model.readouts = \(1,\)",
    ),
    "acceleration_without_readout": (
        {
            **NO_READOUT,
            "objective.terms": {"accelerated_flow": {"weight": 1.0, "omega": 0.5, "bias": "ema"}},
        },
        "objective.terms.accelerated_flow",
        "model.readouts is empty; name a depth there, or use the term flow instead",
    ),
    "cosine_weight": (
        {"objective.terms.cosine": {"weight": -1.0}},
        "objective.terms.cosine.weight = -1.0",
        "must not be negative",
    ),
    "ig_term_without_readout": (
        NO_READOUT,
        "objective.terms.internal_guidance",
        "model.readouts is empty; name a depth there, or remove this term",
    ),
    "learning_rate": ({"optim.learning_rate": 0.0}, "optim.learning_rate = 0.0", "above 0"),
    "b1": ({"optim.b1": 1.0}, "optim.b1 = 1.0", r"in \[0, 1\)"),
    "b1_in_float32": ({"optim.b1": 1 - 1e-12}, "optim.b1 = 0.999999999999", "also as float32"),
    "b2": ({"optim.b2": -0.5}, "optim.b2 = -0.5", r"in \[0, 1\)"),
    "eps": ({"optim.eps": 0.0}, "optim.eps = 0.0", "above 0"),
    "weight_decay": ({"optim.weight_decay": -0.1}, "optim.weight_decay = -0.1", "not be negative"),
    "clip_norm": ({"optim.clip_norm": -1.0}, "optim.clip_norm = -1.0", r"\(0 turns clipping off\)"),
    "warmup": ({"optim.warmup_steps": -1}, "optim.warmup_steps = -1", "not be negative"),
    "schedule": ({"optim.schedule": "step"}, "optim.schedule = 'step'", "constant, cosine, linear"),
    "no_length": (
        {"train.steps": 0},
        "train.steps, images, epochs = None, None, None",
        "exactly one",
    ),
    "two_lengths": (
        {"train.images": 100},
        "train.steps, images, epochs = 24, 100, None",
        r"exactly one of them, above 0, and set the others to None \(0 on the command line\)",
    ),
    "negative_length": ({"train.steps": -5}, "train.steps, images, epochs = -5", "above 0"),
    "batch_0": ({"train.batch_size": 0}, "train.batch_size = 0", "at least 1"),
    "accumulation_0": ({"train.accumulation": 0}, "train.accumulation = 0", "at least 1"),
    "dispatch_0": ({"train.steps_per_dispatch": 0}, "train.steps_per_dispatch = 0", "at least 1"),
    "ema_none": ({"train.ema_decays": ()}, r"train.ema_decays = \(\)", "at least one decay"),
    "ema_1": ({"train.ema_decays": (1.0,)}, r"train.ema_decays = \(1.0,\)", r"in \[0, 1\)"),
    "ema_in_float32": (
        {"train.ema_decays": (1 - 1e-9,)},
        r"train.ema_decays = \(0.999999999,\)",
        "also as float32",
    ),
    "ema_many": (
        {"train.ema_decays": tuple(i / 100 for i in range(50))},
        r"train.ema_decays = \(0.0, .*\)",
        "not above 32",
    ),
    "ema_twice": (
        {"train.ema_decays": (0.9, 0.9)},
        r"train.ema_decays = \(0.9, 0.9\)",
        "each once",
    ),
    "batch_over_devices": (
        {"train.batch_size": 15},
        "train.batch_size = 15",
        "divide over 2 devices x 1 accumulation steps = 2; the next that does: 16",
    ),
    "batch_over_accumulation": (
        {"train.accumulation": 3},
        "train.batch_size = 16",
        "divide over 2 devices x 3 accumulation steps = 6; the next that does: 18",
    ),
    "save_every_0": ({"checkpoint.every_steps": 0}, "checkpoint.every_steps = 0", "at least 1"),
    "keep_last_0": ({"checkpoint.keep_last": 0}, "checkpoint.keep_last = 0", "at least 1"),
    "keep_every_uneven": (
        {"checkpoint.keep_every_steps": 9},
        "checkpoint.keep_every_steps = 9",
        "multiple of every_steps = 6, or 0",
    ),
    "keep_every_negative": (
        {"checkpoint.keep_every_steps": -6},
        "checkpoint.keep_every_steps = -6",
        "or 0 to keep none",
    ),
    "log_every_0": ({"log.every_steps": 0}, "log.every_steps = 0", "at least 1"),
    "preview_negative": (
        {"log.samples_every_steps": -1},
        "log.samples_every_steps = -1",
        r"\(0 draws none\)",
    ),
    "num": ({"sample.num": 0}, "sample.num = 0", "at least 1"),
    "sample_batch_0": ({"sample.batch_size": 0}, "sample.batch_size = 0", "at least 1"),
    "sample_batch_over_devices": (
        {"sample.batch_size": 7},
        "sample.batch_size = 7",
        "divide over 2 devices; the next that does: 8",
    ),
    "sample_seed": ({"sample.seed": -1}, "sample.seed = -1", "must not be negative"),
    "labels_word": ({"sample.labels": "all"}, "sample.labels = 'all'", "random or balanced, or cl"),
    "labels_mixed": ({"sample.labels": "1,x"}, "sample.labels = '1,x'", "such as 0,1,2"),
    "labels_empty": ({"sample.labels": ""}, "sample.labels = ''", "such as 0,1,2"),
    "labels_no_digit": ({"sample.labels": "²"}, "sample.labels = '²'", "such as 0,1,2"),
    "labels_no_class": (
        {"sample.labels": "3,11"},
        "sample.labels = '3,11'",
        "class 11 does not exist; there are 10 classes, 0 to 9, and 10 is the null class",
    ),
    "weights": (
        {"sample.weights": "0.5"},
        "sample.weights = '0.5'",
        r"ema \(the first decay\), raw, or one of train.ema_decays = \(0.9, 0.8\)",
    ),
    "readout_without_head": (
        {"sample.readout": 2},
        "sample.readout = 2",
        r"one of model.readouts = \(1,\), or None",
    ),
    "ig_without_readout": (
        {"model.readouts": (), "objective.terms": {"flow": {"weight": 1.0}}},
        "sample.ig.scale = 2.0",
        r"name a depth in model.readouts, or set the scale to 1 \(off\)",
    ),
    "cfg_without_drop": (
        {"objective.label_drop": 0.0},
        "sample.cfg.scale = 1.2",
        r"set objective.label_drop above 0 .*, or the scale to 1 \(off\)",
    ),
    "ig_backwards": (
        {"sample.ig.low": 0.8, "sample.ig.high": 0.2},
        "sample.ig.low = 0.8, high = 0.2",
        "0 <= low <= high <= 1",
    ),
    "cfg_below": ({"sample.cfg.low": -0.1}, "sample.cfg.low = -0.1", "0 <= low <= high <= 1"),
    "cfg_above": ({"sample.cfg.high": 1.1}, "sample.cfg.low = 0.0, high = 1.1", "t = 1 is noise"),
    "euler_steps": (
        {"sample.sampler.num_steps": 0},
        "sample.sampler.num_steps = 0",
        "at least 1",
    ),
    "steps_many": (
        {"sample.sampler.num_steps": 3 * 10**6},
        "sample.sampler.num_steps = 3000000",
        "at most 100000",
    ),
    "dopri5_steps_many": (
        {"sample.sampler": {**DOPRI5, "num_steps": 10**9}},
        "sample.sampler.num_steps = 1000000000",
        "at most 100000",
    ),
    "sample_batch_large": (
        {"sample.batch_size": 2**30},
        "sample.batch_size = 1073741824",
        "at most 16777216",
    ),
    "label_of_many_digits": (
        {"sample.labels": "9" * 5000},
        "sample.labels = '9+... .5,002 characters.",
        "such as 0,1,2",
    ),
    "grid_large": (
        {"search.space.values": {"ig": {n: (0.5,) * 99 for n in ("scale", "low", "high")}}},
        "search.space.values",
        "a grid of 970,299 points, must not make more than 10,000; list fewer values",
    ),
    "rounds_many": ({"search.rounds": 99}, "search.rounds = 99", "at most 16"),
    "heun_steps": (
        {"sample.sampler": {"name": "heun", "num_steps": -3}},
        "sample.sampler.num_steps = -3",
        "at least 1",
    ),
    "sde_steps": (
        {"sample.sampler": {"name": "euler_maruyama", "num_steps": 1}},
        "sample.sampler.num_steps = 1",
        "at least 2",
    ),
    "heun2_steps": (
        {"sample.sampler": {"name": "heun2", "num_steps": 0}},
        "sample.sampler.num_steps = 0",
        "at least 1",
    ),
    "dopri5_steps": (
        {"sample.sampler": {**DOPRI5, "num_steps": 0}},
        "sample.sampler.num_steps = 0",
        "at least 1",
    ),
    "dopri5_rtol": (
        {"sample.sampler": {**DOPRI5, "rtol": 0.0}},
        "sample.sampler.rtol = 0.0",
        "above 0",
    ),
    "dopri5_atol": (
        {"sample.sampler": {**DOPRI5, "atol": -1e-6}},
        "sample.sampler.atol = -1e-06",
        "above 0",
    ),
    "sampler_field": (
        {"sample.sampler.rtol": 0.1},
        "sample.sampler.rtol",
        "unknown field; known: num_steps",
    ),
    "sampler_field_misspelt": (
        {"sample.sampler": {**DOPRI5, "rtoll": 0.1}},
        "sample.sampler.rtoll",
        "unknown field; did you mean 'rtol'",
    ),
    "time_shift_0": ({"sample.time_shift": 0.0}, "sample.time_shift = 0.0", "above 0; 1 is none"),
    "time_shift_negative": ({"sample.time_shift": -2.0}, "sample.time_shift = -2.0", "above 0"),
    "time_shift_of_dopri5": (
        {"sample.time_shift": 2.0, "sample.sampler": DOPRI5},
        "sample.time_shift = 2.0",
        "this sampler has its own; set it to 1",
    ),
    "channels_negative": (
        {"sample.ig.channels": -1},
        "sample.ig.channels = -1",
        r"must not be negative \(0 is all\)",
    ),
    "channels_many": (
        {"sample.cfg.channels": 2},
        "sample.cfg.channels = 2",
        "latents have 1; 0 guides all of them",
    ),
    "autoguidance_without_run": (
        {"sample.autoguidance.scale": 2.0},
        "sample.autoguidance.scale = 2.0",
        r"name its run in guide.workdir, or set the scale to 1 \(off\)",
    ),
    "guide_step": (
        {"sample.guide.step": -1},
        "sample.guide.step = -1",
        "must be above 0, or None for the newest",
    ),
    "autoguidance_backwards": (
        {"sample.autoguidance.low": 0.5, "sample.autoguidance.high": 0.4},
        "sample.autoguidance.low = 0.5, high = 0.4",
        "0 <= low <= high <= 1",
    ),
    "evaluate_num": ({"evaluate.num": 9}, "evaluate.num = 9", "at least 10"),
    "train_seed_too_large": ({"seed": 2**32}, "seed = 4294967296", r"2\*\*32|4294967295"),
    "sample_seed_too_large": (
        {"sample.seed": 2**32},
        "sample.seed = 4294967296",
        r"2\*\*32|4294967295",
    ),
    "evaluate_no_seeds": ({"evaluate.seeds": ()}, r"evaluate.seeds = \(\)", "needs at least one"),
    "evaluate_seeds": ({"evaluate.seeds": (0, -1)}, r"evaluate.seeds = \(0, -1\)", "negative"),
}


@pytest.mark.parametrize(("changes", "opening", "mend"), RULES.values(), ids=RULES)
def test_a_broken_rule_is_told_with_field_value_and_mend(changes, opening, mend):
    with pytest.raises(ConfigError) as caught:
        run_config.parse(tiny.settings(changes), devices=2)
    message = str(caught.value)
    assert re.match(rf"{opening}[,:].*({mend})", message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {**NO_READOUT, "objective.terms": {"flow": {"weight": 1.0}}},
        {"objective.label_drop": 0.0, "sample.cfg.scale": 1.0},
        {"sample.labels": "0, 10"},
        {"sample.weights": "raw"},
        {"sample.weights": "0.8"},
        {"sample.readout": 1},
        {"sample.ig.low": 0.5, "sample.ig.high": 0.5},
        {"checkpoint.keep_every_steps": 12},
        {"train.ema_decays": (0.0,)},
        {"evaluate.num": 10},
        {"sample.sampler.num_steps": 1},
        {"sample.sampler": DOPRI5},
        {"sample.sampler": {**DOPRI5, "rtol": 1e-2, "atol": 1e-2}},
        {"sample.time_shift": 0.3},
        {"sample.time_shift": 1.0, "sample.sampler": DOPRI5},
        {"sample.ig.channels": 1},
        {"sample.autoguidance.scale": 2.0, "sample.guide.workdir": "runs/elsewhere"},
        {"objective.terms.accelerated_flow": {"weight": 1.0, "omega": 0.0, "bias": "network"}},
        {"objective.terms.cosine": {"weight": 0.0}},
        {"process.path": "vp", "process.prediction": "score"},
        LIGHTNING,
        {"model": {**LIGHTNING["model"], "rope": False, "num_heads": 8}},
    ],
)
def test_what_lies_just_inside_a_rule_is_accepted(changes):
    run_config.parse(tiny.settings(changes), devices=2)
