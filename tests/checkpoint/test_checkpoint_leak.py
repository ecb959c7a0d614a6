"""A save keeps nothing in memory once it is on the disk."""

import gc
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import tiny

from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.training.step import init_state

SAVES = 2
KEPT = 100  # small objects a save; of 131 arrays orbax and tensorstore lost some 1500


@pytest.mark.slow
def test_a_save_keeps_no_objects(tmp_path: Path):
    exp = tiny.experiment()
    state = init_state(exp)
    checkpoints = Checkpoints(tmp_path)

    def objects_after(first: int) -> int:
        for step in range(first, first + SAVES):
            checkpoints.save(state.replace(step=jnp.int32(step)), {"examples": 0}, {})
        checkpoints.wait()
        gc.collect()
        return sys.getallocatedblocks()

    objects_after(0)  # what is kept once, whatever the number of saves
    before = objects_after(SAVES)
    assert objects_after(2 * SAVES) - before < KEPT * SAVES
    checkpoints.close()
