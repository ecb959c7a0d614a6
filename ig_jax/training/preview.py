"""Grids of samples while training: the same noise and labels every time, unguided beside guided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ig_jax import guidance
from ig_jax.generation.batches import sample_batches
from ig_jax.monitoring import console
from ig_jax.parallel.mesh import local_mesh
from ig_jax.pipeline import Pipeline
from ig_jax.plots import image_grid
from ig_jax.types import Params

_ROWS, MOST_COLUMNS = 4, 10


class Preview:
    """Writes previews/step_<n>.png with samples of the first classes, a column each."""

    def __init__(self, pipeline: Pipeline, workdir: Path):
        """
        Args:
          pipeline: samples, guided as its settings say; its parameters are not used.
          workdir: of the run.
        """
        self.directory = workdir / "previews"
        self._columns = min(MOST_COLUMNS, pipeline.num_classes)
        mesh, s = pipeline.mesh, pipeline.sampling
        sampling = replace(
            s,
            labels=",".join(map(str, range(self._columns))),
            batch_size=-(-_ROWS * self._columns // local_mesh(mesh).size) * mesh.size,
        )
        # Without autoguidance: its other network need not exist yet while this one trains.
        self._variants = {
            "unguided": guidance.only(s.guidances, ()),
            f"IG {s.ig.scale:g}, CFG {s.cfg.scale:g}": guidance.only(s.guidances, ("ig", "cfg")),
        }
        self._generator = replace(pipeline, sampling=sampling).generator()

    def draw(self, params: Params, step: int) -> np.ndarray:
        """Writes the image of this step; returns it as uint8 [h, w, 3]."""
        indices, seed = np.arange(_ROWS * self._columns), self._generator.sampling.seed
        named = {}
        for name, guidances in self._variants.items():
            [batch] = sample_batches(self._generator, params, seed, indices, guidances=guidances)
            named[name] = image_grid.grid(batch.images, self._columns)
        image = image_grid.panels(named)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{step:08d}.png"
        image_grid.save(path, image)
        console.say(f"step {step}: {path}")
        return image
