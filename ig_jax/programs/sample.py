"""Sampling: noise to images in one compiled call a batch; files that can be finished later.

Sample i depends on (seed, i) alone: on no batch size, number of devices, or order (but for
rounding, which an adaptive sampler may amplify up to its tolerances). Files that exist
are not made again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax.experiment import Experiment
from ig_jax.generation.batches import labels_of, sample_batches
from ig_jax.generation.cost import cost
from ig_jax.generation.sample_files import SETTINGS, SampleWriter
from ig_jax.io import disk_errors, files
from ig_jax.monitoring import console, flops
from ig_jax.parallel import lock
from ig_jax.parallel.processes import barrier, process_slice
from ig_jax.programs import guide_model
from ig_jax.programs.run_record import folder, load_weights, settings
from ig_jax.types import Params


def run(exp: Experiment, workdir: Path) -> Path:
    """Draws `sample.num` images from the newest checkpoint of `workdir`; returns their folder.

    Raises:
      UserError: there is no checkpoint; a sample is not finite; another program draws the same
        samples; the disk is full or gone.
    """
    with disk_errors.reported(workdir):
        step, params = load_weights(exp, workdir)
        record = settings(exp, step)
        target = folder(workdir / "samples", record)
        with lock.held(target), disk_errors.reported(target):
            _draw(exp, params, target, record)
    return target


def _draw(exp: Experiment, params: Params, target: Path, record: dict[str, Any]) -> None:
    """Draws into the folder `target` what is missing there."""
    s = exp.config.sample
    generator = exp.pipeline.generator(guide=guide_model.load(exp.pipeline))
    kept = SampleWriter(target, s.num, generator.shape, s.files)
    of_image = cost(generator)
    if jax.process_index() == 0:
        kept.create()
        files.write_json(target / SETTINGS, record | {"an_image": of_image})
    barrier("begun")
    mine = np.array(process_slice(s.num))
    missing = kept.missing(mine)
    # The bar is of this process, whose share takes as long as everybody's.
    done = len(mine) - len(missing)
    with console.progress(len(mine), initial=done, unit="image", what="sampling") as bar:
        for indices, images, _ in sample_batches(generator, params, s.seed, missing):
            kept.write(indices, images)
            bar.update(len(indices))
    barrier("sampled")
    if jax.process_index() == 0:
        names = kept.finish(labels_of(s, exp.num_classes, s.seed, np.arange(s.num)))
        step = record["checkpoint_step"]
        console.say(f"{s.num:,} samples of step {step} are in {target} ({', '.join(names)})")
        if of_image is not None:
            console.say(
                f"each took {of_image['evaluations']} evaluations of the network, "
                f"{flops.in_words(of_image['flops'])}"
            )
