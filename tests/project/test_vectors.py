"""The helper of the golden tests: what it does where a directory of --golden lacks something."""

import json

import numpy as np
import pytest
from vectors import GOLDEN, Vectors, golden_entry, golden_file


@pytest.fixture
def folder(tmp_path):
    """Another directory: the entries and arrays of one set of vectors, and no weights."""
    for file in ("configs.json", "tolerances.json"):
        (tmp_path / file).write_text(json.dumps({"here": {}}))
    np.savez(tmp_path / "here.npz", x=np.ones(2))
    return tmp_path


def test_what_another_directory_holds_is_read(folder):
    here = Vectors(folder, "here")
    assert here.config == here.tolerances == {} and here["x"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("read", "missing"),
    [
        (lambda f: golden_file(f, "inception.npz"), "holds no inception.npz"),
        (lambda f: Vectors(f, "here").weights("_ema"), "holds no here_ema.safetensors"),
        (lambda f: Vectors(f, "there").arrays, "holds no there.npz"),
        (lambda f: Vectors(f, "there").config, "configs.json has no entry there"),
        (lambda f: golden_entry(f / "nowhere", "configs.json", "here"), "holds no configs.json"),
    ],
)
def test_a_test_is_skipped_by_what_another_directory_lacks(folder, read, missing):
    with pytest.raises(pytest.skip.Exception, match=missing):
        read(folder)


def test_nothing_may_be_missing_from_the_directory_of_the_tests():
    with pytest.raises(FileNotFoundError):
        Vectors(GOLDEN, "there").weights()
    with pytest.raises(KeyError):
        golden_entry(GOLDEN, "configs.json", "there")
