"""Sampling and evaluation that were killed, twice, leave what unbroken runs leave.

The kills are real, of processes of their own: tests/helpers/killed.py.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny

pytestmark = pytest.mark.slow
NUM = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("killed")
    for name in ("broken", "unbroken"):
        tiny.trained().copy(target / name)
    script = [sys.executable, "tests/helpers/killed.py", str(target), f"--num={NUM}"]
    done = subprocess.run(script, cwd=tiny.ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def files(folder, place) -> dict[str, bytes]:
    [made] = (folder / place).iterdir()
    return {f.name: f.read_bytes() for f in made.iterdir()}


def test_the_kills_came_in_the_middle(folder):
    kills = json.loads((folder / "kills.json").read_text())
    for first, second in kills.values():
        assert NUM / 5 <= first < second < NUM


def test_samples_are_the_same_files(folder):
    broken, unbroken = (files(folder / name, "samples") for name in ("broken", "unbroken"))
    assert len(unbroken) == NUM + 3 and broken == unbroken
    [target] = (folder / "broken" / "samples").iterdir()
    with np.load(target / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (NUM, 8, 8, 1)
        # ADM's inception score takes consecutive samples: any of them hold every class.
        counts = [np.bincount(part, minlength=10) for part in arrays["arr_1"].reshape(10, -1)]
        assert np.all(np.array(counts) == NUM / 100)


def test_the_verdict_is_the_same(folder):
    records = [
        json.loads(files(folder / name, "evaluations")["results.json"])
        for name in ("broken", "unbroken")
    ]
    assert records[0] == records[1]
    assert records[0]["samples"] == NUM and records[0]["measures"]["fd"]["mean"] > 0
    assert list(files(folder / "broken", "evaluations")) == ["results.json"]
