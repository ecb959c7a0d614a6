"""Grids of samples while training: the same noise and labels every time, unguided beside guided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ig_jax import guidance
from ig_jax.experiment import Experiment
from ig_jax.generation import batches, generator
from ig_jax.monitoring import console
from ig_jax.plots import image_grid
from ig_jax.types import Params

ROWS, MOST_COLUMNS = 4, 10


class Preview:
    """Draws samples/step_<n>.png for the first classes, a column each."""

    def __init__(self, exp: Experiment, workdir: Path):
        self.directory = workdir / "previews"
        columns = min(MOST_COLUMNS, exp.num_classes)
        s = replace(
            exp.config.sample,
            labels=",".join(map(str, range(columns))),
            batch_size=-(-ROWS * columns // exp.own_mesh.size) * exp.mesh.size,
        )
        self.columns = columns
        self.exp = replace(exp, config=replace(exp.config, sample=s))
        # Without autoguidance: its other network need not exist yet while this one trains.
        guided = guidance.only(s.guidances, ("ig", "cfg"))
        self.ways = {
            "unguided": guidance.only(s.guidances, ()),
            f"IG {s.ig.scale:g}, CFG {s.cfg.scale:g}": guided,
        }
        self.generator = generator.Generator(self.exp)

    def draw(self, params: Params, step: int) -> np.ndarray:
        """Writes the picture of this step; returns it as uint8 [h, w, 3]."""
        indices = np.arange(ROWS * self.columns)
        seed = self.exp.config.sample.seed
        named = {}
        for name, guidances in self.ways.items():
            drawn = batches.batches(self.generator, params, seed, indices, guidances=guidances)
            [(_, images, _)] = drawn
            named[name] = image_grid.grid(images, self.columns)
        picture = image_grid.panels(named)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{step:08d}.png"
        image_grid.save(path, picture)
        console.say(f"step {step}: {path}")
        return picture
