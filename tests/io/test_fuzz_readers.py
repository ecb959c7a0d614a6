"""Damaged files of every kind that is read: a value comes of it, or one sentence."""

import subprocess
import sys

import fuzz_readers
import pytest
from places import HELPERS

BROKEN = """
import os, sys
sys.path.insert(0, {here!r})
import fuzz_readers
import numpy as np
from ig_jax.errors import UserError
from kinds_of_files import Case, as_files

def read(folder):
    what = (folder / "file").read_bytes()[0] % 8
    match what:
        case 0: raise UserError("of one line")
        case 1: raise UserError("of two\\nlines")
        case 2: raise KeyError("something else")
        case 3: np.ones(fuzz_readers.ROOM + (1 << 20), np.uint8)
        case 4: os.abort()
        case 5: np.ones(fuzz_readers.ROOM // 2, np.uint8)

def damaged(parts, name, number, seed):
    return {{"file": bytes([number])}}

fuzz_readers.__file__ = __file__
fuzz_readers._damaged_parts = damaged
fuzz_readers.CASES = {{
    "toy": Case(lambda: {{"file": b"7"}}, as_files, read),
    "unreadable": Case(lambda: {{"file": b"2"}}, as_files, read),
    "last": Case(lambda: {{"file": b"7"}}, as_files, read),
}}
sys.exit(fuzz_readers.main())
"""


def test_what_must_not_come_of_a_damaged_file_is_told_and_the_others_are_read(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(here=str(HELPERS)))
    ran = subprocess.run([sys.executable, script, "--num=7"], capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    begun = [line for line in ran.stdout.splitlines() if line.startswith(("toy", "unre", "last"))]
    of_each = [
        "1: its error is long",
        "2: Traceback",
        "3: Traceback",
        "4: the process ended with -6",
    ]
    expected = [f"toy {told}" for told in of_each]
    expected += ["unreadable: cannot be made or read whole"] + [f"last {told}" for told in of_each]
    assert [told[: len(e)] for told, e in zip(begun, expected, strict=True)] == expected
    assert "KeyError: 'something else'" in ran.stdout and "MemoryError" in ran.stdout
    assert ran.stdout.endswith("21 damaged files, 9 failures\n")


def _failures(num, seed):
    jobs = [(name, number) for name in fuzz_readers.CASES for number in range(num)]
    return list(fuzz_readers.failures(jobs, seed))


def test_a_few_damaged_files_of_every_kind_are_read_or_refused_in_a_sentence():
    assert _failures(20, seed=0) == []


@pytest.mark.slow
def test_two_thousand_damaged_files_of_every_kind_are_read_or_refused_in_a_sentence():
    assert _failures(2000, seed=1) == []


def test_damage_is_the_same_for_the_same_seed_and_changes_most_files():
    parts = {"a": bytes(range(200)), "b": b"{'shape': (3, 4)}" * 9}
    drawn = [fuzz_readers._damaged_parts(parts, "npz", n, seed=5) for n in range(50)]
    assert drawn == [fuzz_readers._damaged_parts(parts, "npz", n, seed=5) for n in range(50)]
    assert sum(found != parts for found in drawn) > 40
