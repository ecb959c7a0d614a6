"""A run that is killed or stopped, at any moment, goes on to the bits of an unbroken one.

tests/helpers/chaos.py does it, to runs that are processes of their own, as a user starts them.
"""

import json
import subprocess
import sys

import pytest
import tiny


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [3, pytest.param(100, marks=pytest.mark.slow)], ids=["3_kills", "100_kills"]
)
def test_a_run_killed_and_stopped_again_and_again_ends_with_the_bits_of_an_unbroken_one(
    tmp_path, kills
):
    done = subprocess.run(
        [
            *(sys.executable, "tests/helpers/chaos.py", "--config=tests/helpers/tiny.py"),
            *(f"--kills={kills}", f"--workdir={tmp_path / 'chaos'}"),
        ],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, line, sentence = done.stdout.splitlines()
    report = json.loads(line)
    assert report["equal"] is True and "equals that of an unbroken run" in sentence
    assert report["kills"] == kills and report["starts"] == kills + 3  # two were stopped by signals
    assert report["inside_a_save"] >= kills // 3
    assert report["before_the_first_save"] >= 1
    # A save is written while the steps up to the next one are done.
    assert 0 < report["most_steps_repeated"] <= 2 * report["save_every"]
