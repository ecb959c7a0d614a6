"""The section `probe`: settings of linear probing. `configs/base.py` explains its fields."""

from __future__ import annotations

from dataclasses import dataclass

from ig_jax.bounds import at_most, unset
from ig_jax.config.parser import require
from ig_jax.config.schema import LARGEST_BATCH, MOST_SAMPLES, MOST_TIMES, SEED_RULE, SEEDS
from ig_jax.io.paths import Location

LABELS = ("null", "true")
POOLINGS = ("mean", "max")
NORMS = ("none", "batch")


@dataclass(frozen=True)
class Probe:
    """Settings of --mode=probe, which fits linear classifiers to a frozen network's features."""

    times: tuple[float, ...]
    blocks: tuple[int, ...]
    labels: str
    pooling: str
    norm: str
    flip: bool
    epochs: float
    batch_size: int = at_most(LARGEST_BATCH)
    learning_rate: float
    weight_decay: float
    validation_share: float
    neighbours: int
    bank: int = at_most(MOST_SAMPLES)
    seed: int = at_most(SEEDS - 1)
    save_every_steps: int
    test_path: Location | None = unset("")
    test_split: str | None = unset("")

    def __post_init__(self):
        rule = f"needs 1 to {MOST_TIMES} times in [0, 1], each once; 0 is data, 1 is noise"
        known = 1 <= len(set(self.times)) == len(self.times) <= MOST_TIMES
        require(known and all(0 <= t <= 1 for t in self.times), "times", self.times, rule)
        rule = "must be numbers of blocks from 1, each once; () for all"
        known = len(set(self.blocks)) == len(self.blocks) and all(b >= 1 for b in self.blocks)
        require(known, "blocks", self.blocks, rule)
        for name, choices in (("labels", LABELS), ("pooling", POOLINGS), ("norm", NORMS)):
            value = getattr(self, name)
            require(value in choices, name, value, f"must be {' or '.join(choices)}")
        for name in ("epochs", "learning_rate"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        for name in ("batch_size", "save_every_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must not be negative")
        rule = "must lie in (0, 0.5]; 0.01 is usual for large data sets"
        require(0 < self.validation_share <= 0.5, "validation_share", self.validation_share, rule)
        rule = "must not be negative (0 asks no neighbours)"
        require(self.neighbours >= 0, "neighbours", self.neighbours, rule)
        require(self.bank >= 1, "bank", self.bank, "must be at least 1")
        require(0 <= self.seed < SEEDS, "seed", self.seed, SEED_RULE)


# What configs of older runs have, and calls from Python that name nothing else.
DEFAULTS = Probe(
    times=(0.05, 0.1, 0.2, 0.3, 0.4),
    blocks=(),
    labels="null",
    pooling="mean",
    norm="none",
    flip=True,
    epochs=15.0,
    batch_size=128,
    learning_rate=1e-3,
    weight_decay=0.0,
    validation_share=0.01,
    neighbours=20,
    bank=50_000,
    seed=0,
    save_every_steps=1000,
    test_path=None,
    test_split=None,
)
