"""Compatibility of a run's settings with those that its checkpoint was made under, by purpose.

Every section that counts is compared whole, but for the fields that are free: a field nobody has
thought of refuses rather than lets pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ig_jax import pytree

# What must be the same for a run to be continued, and for its weights to be sampled from.
CONTINUES = ("seed", "model", "process", "data", "objective", "optim", "train")
SAMPLES = ("model", "process")
# What must be the same for an imported optimizer's state to be used.
UPDATES = ("optim",)
# Fields of those that may differ: they change how far or how fast, not what.
FREE = (
    "train.steps",
    "train.images",
    "train.epochs",
    "train.steps_per_dispatch",
    "model.remat",
    "model.unroll",
    # Where files lie; that they are of the same kind is checked against the record beside them.
    "data.source.path",
    "data.codec.weights",
    "data.codec.statistics",
    # Of decoded images, which no network sees.
    "data.codec.rounding",
    # What is refused, not what is read.
    "data.source.fewer_classes",
)
# What matters to training alone, or to rounding.
FREE_WHEN_SAMPLING = (
    "model.dtype",
    "process.time_distribution",
    "process.time_mean",
    "process.time_std",
)
# What an imported optimizer's state may be trained on with: they change the step, not the state.
FREE_OF_STATE = (
    "optim.learning_rate",
    "optim.weight_decay",
    "optim.vector_weight_decay",
    "optim.warmup_steps",
    "optim.schedule",
    "optim.ns_steps",
    "optim.ns_dtype",
)
# Fields that configs of older runs lack -> what those runs had.
SINCE = {
    "optim.vector_weight_decay": 0.0,
    "train.only": "",
    "train.ema_warmup_power": 0.0,
    "train.ema_sigma_rel": [],
    "objective.teacher_decay": 0.0,
    "objective.groups.shares": [],
    "objective.groups.dual_time": False,
    "objective.groups.separate_attention": False,
    "objective.groups.full_sample_prob": 0.0,
}


# Fields that a run may change when it resumes, which is reported: they change later steps, and
# leave what its state is made of.
REPORTED = (
    *(*FREE_OF_STATE, "optim.b1", "optim.b2", "optim.eps", "optim.momentum"),
    *("train.batch_size", "train.accumulation", "train.ema_decays", "train.ema_warmup_power"),
)
# The same but for 0, which turns off a part of the state.
REPORTED_UNLESS_0 = ("optim.clip_norm", "train.spike_factor")


def as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists, so that old and new compare equal."""
    return json.loads(json.dumps(config))


def mismatches(
    old: Mapping[str, Any], new: Mapping[str, Any], sections: tuple[str, ...]
) -> list[str]:
    """Fields of `sections` in which two raw configs differ, other than the free ones."""
    free = FREE + {
        SAMPLES: FREE_WHEN_SAMPLING,
        UPDATES: FREE_OF_STATE,
        CONTINUES: tuple(path for path, _, _ in changes(old, new)),
    }.get(sections, ())

    def chosen(config: Mapping[str, Any]) -> dict[str, Any]:
        older = {p: v for p, v in SINCE.items() if p.partition(".")[0] in sections}
        flat = older | pytree.flatten({s: config[s] for s in sections if s in config})
        return pytree.unflatten({p: v for p, v in flat.items() if p not in free})

    return pytree.differences(chosen(as_json(old)), chosen(as_json(new)))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of what a run may change when it resumes, which is reported."""
    return [
        (path, before, now)
        for path, before, now in changed_fields(old, new)
        if path in REPORTED or (path in REPORTED_UNLESS_0 and before and now)
    ]


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of every field in which two raw configs that have it differ."""
    a, b = pytree.flatten(as_json(old)), pytree.flatten(as_json(new))
    return [(path, a[path], b[path]) for path in a if path in b and a[path] != b[path]]
