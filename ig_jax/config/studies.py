"""The sections `study` and `select`: what is trained side by side, and compared.

Documentation of the fields lives in `configs/base.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ig_jax.bounds import at_most, unset
from ig_jax.config.parser import ConfigError, each, require
from ig_jax.config.schema import SEED_RULE, SEEDS

# Sections that methods may differ in: data and evaluation are those of the whole table.
VARIED = ("model", "process", "objective", "optim", "train", "sample")
MOST_SEEDS = 1000
_FEWEST = "needs at least 2, each once: an interval is made of their differences"
NOTHING: Mapping[str, Any] = MappingProxyType({})


def _check_seeds(seeds: tuple[int, ...]) -> None:
    require(
        2 <= len(seeds) <= MOST_SEEDS and len(set(seeds)) == len(seeds), "seeds", seeds, _FEWEST
    )
    require(all(0 <= s < SEEDS for s in seeds), "seeds", seeds, f"each {SEED_RULE}")


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    # The method whose run is sampled; None: it has a run of its own.
    same_run_as: str | None = unset("", None)
    # The method whose run of the same seed guides (autoguidance).
    guide: str | None = unset("", None)
    # The method whose run of the same seed this one's starts from.
    init_from: str | None = unset("", None)

    def __post_init__(self):
        if self.same_run_as and self.init_from:
            raise ConfigError(
                f"init_from = {self.init_from!r}: this method trains no run; leave out "
                "same_run_as, or this"
            )
        varied = ("sample",) if self.same_run_as else VARIED
        for section in self.overrides:
            if section not in varied:
                raise ConfigError(
                    f"overrides.{section}: cannot differ from method to method"
                    f"{' that share a run' if self.same_run_as else ''}; those that can: "
                    f"{', '.join(varied)}"
                )


@dataclass(frozen=True)
class LinearProbe:
    """Blocks and time at which the features of the linear classifier are taken."""

    blocks: tuple[int, ...]
    time: float

    def __post_init__(self):
        different = len(set(self.blocks)) == len(self.blocks)
        known = different and all(block >= 1 for block in self.blocks)
        require(known, "blocks", self.blocks, "must be numbers of blocks from 1, each once")
        require(0 <= self.time <= 1, "time", self.time, "must lie in [0, 1]; 0 is data, 1 is noise")


@dataclass(frozen=True)
class Study:
    """Settings of --mode=study."""

    methods: Mapping[str, Method] = each(Method)
    seeds: tuple[int, ...] = at_most(SEEDS - 1)
    baseline: str | None = unset("")
    measures: tuple[str, ...]
    probe: LinearProbe

    def __post_init__(self):
        _check_seeds(self.seeds)
        different = len(set(self.measures)) == len(self.measures) > 0
        require(different, "measures", self.measures, "needs at least one, each once")
        for name, method in self.methods.items():
            rule = "must be letters, digits, '_', '-', '.', ',' and '=', as a folder's name"
            fits = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=-]*", name)
            require(fits is not None, "methods", name, rule)
            for kind in ("same_run_as", "guide", "init_from"):
                self._check_run(f"methods.{name}.{kind}", getattr(method, kind))
        if self.methods and self.baseline is not None:
            self._require_method("baseline", self.baseline)

    def _require_method(self, place: str, name: str) -> None:
        rule = f"must be one of study.methods: {', '.join(self.methods)}"
        require(name in self.methods, place, name, rule)

    def _check_run(self, place: str, name: str | None) -> None:
        if name is not None:
            self._require_method(place, name)
            other = self.methods[name].same_run_as
            rule = f"has no run of its own; name {other!r}, whose run it samples"
            require(other is None, place, name, rule)


@dataclass(frozen=True)
class Select:
    """Settings of --mode=select."""

    values: Mapping[str, Any]  # sections of tuples
    seeds: tuple[int, ...] = at_most(SEEDS - 1)
    metric: str

    def __post_init__(self):
        _check_seeds(self.seeds)


NO_STUDY = Study(
    NOTHING, (0, 1, 2, 3, 4), None, ("fid", "precision", "recall"), LinearProbe((), 0.1)
)
NO_SELECTION = Select(NOTHING, (0, 1, 2), "loss")
