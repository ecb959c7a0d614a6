"""A run that is killed or stopped, at any moment, goes on to the bits of an unbroken one.

Every run here is a process of its own, as a user starts it.
"""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from ig_jax import logs, sharding, train
from ig_jax.checkpoint import Checkpoints

STEPS, SAVE_EVERY = 80, 4
PATIENCE = 120  # seconds


def changes(steps: int) -> dict[str, int]:
    return {
        "train.steps": steps,
        "checkpoint.every_steps": SAVE_EVERY,
        "log.every_steps": SAVE_EVERY,
    }


def start(workdir: Path, steps: int = STEPS) -> subprocess.Popen:
    overrides = [f"--config.{name}={value}" for name, value in changes(steps).items()]
    command = [sys.executable, "main.py", "--config=tests/tiny.py", f"--workdir={workdir}"]
    return subprocess.Popen(
        [*command, *overrides],
        cwd=tiny.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    """Returns as soon as the condition holds; the process must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.001)


def finish(process: subprocess.Popen) -> str:
    """What a process said that ended well."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out


def saving(workdir: Path) -> bool:
    """Whether a save is being written."""
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def saved(workdir: Path) -> int:
    """The newest finished checkpoint's step."""
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def kill_later(workdir: Path, steps: int, moment: random.Random, inside_save: bool) -> bool:
    """Goes on with the run and kills it one to three saves later; tells whether inside one."""
    process = start(workdir, steps)
    later = saved(workdir) + SAVE_EVERY * moment.randint(1, 3)
    wait_for(lambda: saved(workdir) >= later, process)
    if inside_save:
        wait_for(lambda: saving(workdir), process)
    else:
        time.sleep(moment.uniform(0, 0.2))
    kill(process)
    return saving(workdir)


def final_state(workdir: Path, steps: int) -> train.TrainState:
    exp = tiny.experiment(changes(steps))
    like = jax.eval_shape(lambda: train.init_state(exp))
    checkpoints = Checkpoints(workdir, keep_last=2)
    assert checkpoints.latest_step() == steps
    state = checkpoints.restore(steps, like, sharding.replicated(exp.mesh))
    checkpoints.close()
    return state


def told(workdir: Path) -> list[dict]:
    """The metrics but for their rates."""
    lines = logs.read_metrics(workdir)
    return [{k: v for k, v in m.items() if not k.endswith("per_second")} for m in lines]


@pytest.fixture(scope="module")
def assert_ends_as_unbroken(tmp_path_factory):
    """Compares a finished workdir with one whose run was left alone."""

    @functools.cache
    def unbroken(steps: int) -> Path:
        workdir = tmp_path_factory.mktemp("unbroken")
        train.run(tiny.experiment(changes(steps)), workdir)
        return workdir

    def compare(workdir: Path, steps: int = STEPS) -> None:
        ours, theirs = final_state(workdir, steps), final_state(unbroken(steps), steps)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
        assert told(workdir) == told(unbroken(steps))
        assert [m["step"] for m in told(workdir)] == list(range(4, steps + 1, SAVE_EVERY))
        assert set(os.listdir(workdir / "checkpoints")) == {str(steps - SAVE_EVERY), str(steps)}

    unbroken(STEPS)  # compiles what the processes will run
    return compare


@pytest.mark.parametrize(
    ("kills", "steps"),
    [(3, STEPS), pytest.param(20, 5 * STEPS, marks=pytest.mark.slow)],
    ids=["3_kills", "20_kills"],
)
def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_unbroken_one(
    assert_ends_as_unbroken, tmp_path, kills, steps
):
    before_any_save = start(tmp_path, steps)
    wait_for((tmp_path / "metrics.jsonl").exists, before_any_save)
    kill(before_any_save)
    moment = random.Random(kills)
    inside = [kill_later(tmp_path, steps, moment, i % 3 != 1) for i in range(kills - 1)]
    assert any(inside), "no kill fell into a save"
    assert f"resuming {tmp_path} at step {saved(tmp_path)}" in finish(start(tmp_path, steps))
    assert_ends_as_unbroken(tmp_path, steps)


def test_a_run_stopped_by_signals_saves_at_once_and_ends_with_the_bits_of_an_unbroken_one(
    assert_ends_as_unbroken, tmp_path
):
    for number in (signal.SIGTERM, signal.SIGINT):
        process, before = start(tmp_path), saved(tmp_path)
        wait_for(lambda: saved(tmp_path) > before + SAVE_EVERY, process)  # noqa: B023
        process.send_signal(number)
        said = finish(process).splitlines()[-1]
        step = saved(tmp_path)
        assert said == (
            f"{number.name}: saved step {step} of {STEPS} in {tmp_path}; "
            "run the same command again to go on"
        )
        assert step < STEPS and not saving(tmp_path)
    finish(start(tmp_path))
    assert_ends_as_unbroken(tmp_path)
