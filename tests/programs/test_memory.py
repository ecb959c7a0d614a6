"""Sizes that this machine cannot hold are told before anything is computed, and only then."""

import re

import jax
import pytest
import tiny

from configs import sit_xl
from ig_jax import experiment, modes
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.programs import dry_run, memory_check

HUGE = {"model.hidden_size": 2**16, "model.depth": 1024}


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr(memory_check, "of_host", lambda: 10**9)


@pytest.mark.parametrize(
    "mode", ["train", "sample", "evaluate", "search", "demo", "replay", "visualize"]
)
def test_a_model_beyond_the_machine_is_refused_before_anything_is_written(tmp_path, mode):
    with pytest.raises(UserError) as caught:
        modes.run(tiny.settings(HUGE), workdir=str(tmp_path / "run"), mode=mode)
    assert re.fullmatch(
        r"model: [\d,]+ parameters take [\d.]+ [TP]B .* on each device, but there are "
        r"[\d.,]+ [MGT]B; lower model.hidden_size or model.depth.*",
        str(caught.value),
    )
    assert not list(tmp_path.iterdir())


def test_a_dry_run_describes_what_other_machines_hold(small_machine, capsys):
    """As before a pod is paid for."""
    modes.run(sit_xl.get_config(), workdir="unused", dry_run=True)
    out = capsys.readouterr().out
    assert re.search(r"^training does not fit here: model: 677,786,144 parameters", out, re.M)
    assert re.search(r"^sampling does not fit here: model: ", out, re.M)
    assert "from t" in out


def test_pictures_of_others_are_judged_whatever_the_model_takes():
    huge = tiny.experiment({**HUGE, "evaluate.samples": "samples.npz"})
    assert memory_check.shortage(huge, "evaluate") == ""
    assert memory_check.shortage(huge, "sample")


def test_what_fits_is_not_mentioned(small_machine):
    exp = tiny.experiment()
    assert {memory_check.shortage(exp, mode) for mode in modes.MODES} == {""}
    assert "does not fit" not in dry_run.describe(exp)


@pytest.mark.parametrize(
    "mode, field, value",
    [
        ("train", "train.batch_size", 2**22),
        ("train", "train.steps_per_dispatch", 10**6),
        ("sample", "sample.batch_size", 2**22),
        ("prepare", "prepare.batch_size", 2**24),
    ],
)
def test_a_batch_beyond_the_machine_is_named(small_machine, mode, field, value):
    found = memory_check.shortage(tiny.experiment({field: value}), mode)
    assert re.match(rf"{field} = {value}: takes at least [\d.]+ GB at a time, but this", found)
    assert "; lower it" in found


def test_a_device_with_memory_of_its_own_is_asked_for_it(monkeypatch):
    class Gpu:
        def memory_stats(self):
            return {"bytes_limit": 12345}

    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    assert memory_check.of_device() == 12345


def test_accumulation_makes_room(small_machine):
    changes = {"train.batch_size": 2**20}
    parts = {**changes, "train.accumulation": 2**8}
    assert memory_check.shortage(tiny.experiment(changes), "train")
    assert not memory_check.shortage(tiny.experiment(parts), "train")


def test_sizes_are_told_in_units():
    assert [memory_check.size_text(n) for n in (10**6, 24 * 10**9, 48 * 10**11, 10**19)] == [
        *("1 MB", "24 GB", "4.8 TB", "10 EB")
    ]


def test_one_device_holds_what_two_share():
    """Of a CPU, whose devices are all in the same memory."""
    assert memory_check.of_device() == memory_check.of_host() // jax.local_device_count()
    c = run_config.parse(tiny.settings(), devices=1)
    assert memory_check.shortage(experiment.experiment(c, jax.devices()[:1]), "train") == ""
