"""A second encoder: its statistics and its distance come of the same pass over the images."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import tiny
from readme import example

from ig_jax.config.parser import ConfigError
from ig_jax.errors import UserError
from ig_jax.metrics import FEATURES
from ig_jax.programs import evaluate, reference

FIRST = {"evaluate.features": {"name": "thumbnails", "side": 3}}
SECOND = {"name": "corners", "side": 2}
BOTH = FIRST | {"evaluate.second_features": SECOND}


@pytest.fixture(autouse=True)
def corners(monkeypatch):
    @dataclass(frozen=True)
    class Corners(example("Thumbnails")):
        """A cheap stand-in for DINOv2."""

        frechet: ClassVar[str] = "fd_dinov2"

    monkeypatch.setitem(FEATURES, "corners", Corners)
    monkeypatch.setitem(FEATURES, "thumbnails", example("Thumbnails"))


def made(folder, changes):
    folder.mkdir()
    reference.run(tiny.experiment(changes), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_pass_writes_the_files_of_two(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "PART", 400)
    monkeypatch.setattr(reference, "CHOSEN", 100)
    both = made(tmp_path / "both", BOTH)
    first = made(tmp_path / "first", FIRST)
    second = made(tmp_path / "second", {"evaluate.features": SECOND})
    assert both == {
        "reference.npz": first["reference.npz"],
        "reference-fd_dinov2.npz": second["reference.npz"],
    }


def test_what_is_there_is_not_made_again_and_what_is_missing_is(tmp_path, capsys):
    changes = BOTH
    both = made(tmp_path / "both", changes)
    capsys.readouterr()
    reference.run(tiny.experiment(changes), tmp_path / "both")
    assert "reference-fd_dinov2.npz: there already" in capsys.readouterr().out
    (tmp_path / "both" / "reference-fd_dinov2.npz").write_bytes(b"")
    reference.run(tiny.experiment(changes), tmp_path / "both")
    assert {p.name: p.read_bytes() for p in (tmp_path / "both").iterdir()} == both
    told = capsys.readouterr().out
    assert "set evaluate.reference and evaluate.second_reference to them" in told


def test_samples_are_compared_in_both_spaces_at_once(tmp_path, capsys):
    reference.run(tiny.experiment(BOTH), tmp_path)
    files = [str(tmp_path / name) for name in ("reference.npz", "reference-fd_dinov2.npz")]
    workdir = tiny.trained().copy(tmp_path / "run")
    first = {"evaluate.reference": files[0]}
    plain = evaluate.run(tiny.experiment(FIRST | first), workdir)
    alone = {"evaluate.features": SECOND, "evaluate.reference": files[1]}
    alone = evaluate.run(tiny.experiment(alone), workdir)
    capsys.readouterr()
    both = BOTH | first | {"evaluate.second_reference": files[1]}
    record = evaluate.run(tiny.experiment(both), workdir)
    expected = plain["measures"] | {"fd_dinov2": alone["measures"]["fd_dinov2"]}
    assert record["measures"] == expected and alone["measures"]["fd_dinov2"]["mean"] > 0
    assert record["floor"]["fd_dinov2"] == alone["floor"]["fd_dinov2"]
    assert record["standard_errors"][0]["fd_dinov2"] == alone["standard_errors"][0]["fd_dinov2"]
    assert record["second_features"]["name"] == "Corners"
    assert record["second_reference"]["sha256"] == alone["reference"]["sha256"]
    assert "second_features" not in plain
    assert "| FD DINOv2 " in capsys.readouterr().out
    assert len(list((workdir / "evaluations").iterdir())) == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "evaluate.second_reference = None: name statistics of real images"),
        (
            {"second_reference": "thousand.npz"},
            "evaluate.second_reference = '.*thousand.npz': is of features with 1000 numbers, but "
            "Corners gives 4;",
        ),
        (
            {"second_reference": "absent.npz"},
            "evaluate.second_reference = absent.npz: cannot be read",
        ),
        (
            {"second_features": {"name": "dinov2", "weights": None}},
            "evaluate.second_features: weights = None: no such file; FD_DINOv2 needs",
        ),
    ],
)
def test_what_the_second_encoder_lacks_is_told_by_its_field(tmp_path, monkeypatch, changes, told):
    monkeypatch.chdir(tmp_path)
    np.savez("thousand.npz", mu=np.zeros(1000), sigma=np.eye(1000))
    np.savez("first.npz", mu=np.zeros(9), sigma=np.eye(9))
    asked = {"reference": "first.npz", "second_features": SECOND} | changes
    changes = FIRST | {f"evaluate.{name}": value for name, value in asked.items()}
    workdir = tiny.trained().copy(tmp_path / "run")
    with pytest.raises(UserError, match=told):
        evaluate.run(tiny.experiment(changes), workdir)


def test_two_encoders_have_distances_of_two_names():
    thumbnails = FIRST | {"evaluate.second_features": {"name": "thumbnails", "side": 2}}
    told = "evaluate.second_features = 'Thumbnails': its distance must not be called fd too"
    with pytest.raises(ConfigError, match=told):
        tiny.experiment(thumbnails)
