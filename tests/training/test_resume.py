"""Going on with other settings: what is told, with the learning rates that the schedules give."""

import math
import re

import numpy as np
import pytest
import tiny

from ig_jax.checkpoint import compatibility
from ig_jax.training import resume_changes

PEAK, WARMUP = 3e-3, 5  # of the tiny run


def told(old, new, step) -> list[str]:
    """What a tiny run changed to `new` says when it goes on from `step`; `old`: until then."""
    return resume_changes.describe_changes(tiny.experiment(new), tiny.settings(old).to_dict(), step)


def rates(line: str) -> tuple[float, float]:
    return tuple(map(float, re.search(r"jumps from (\S+) to (\S+) at step", line).groups()))


def cosine(step: int, steps: int) -> float:
    return PEAK * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))) / 2


def test_a_longer_run_on_a_cosine_tells_both_rates():
    schedule = {"optim.schedule": "cosine"}
    (line,) = told({**schedule, "train.steps": 100}, {**schedule, "train.steps": 1000}, 90)
    np.testing.assert_allclose(rates(line), (cosine(90, 100), cosine(90, 1000)), rtol=5e-3)
    assert "at step 90: optim.schedule was cosine over 100 steps" in line
    assert "cosine over 1,000" in line


def test_a_finished_cosine_jumps_from_nothing_back_up():
    schedule = {"optim.schedule": "cosine"}
    (line,) = told({**schedule, "train.steps": 100}, {**schedule, "train.steps": 1000}, 100)
    np.testing.assert_allclose(rates(line), (0, cosine(100, 1000)), rtol=5e-3)


def test_the_length_counts_in_whatever_it_is_given():
    old = {"optim.schedule": "linear", "train.steps": 0, "train.epochs": 1.0}  # 91 steps of 16
    (line,) = told(old, {**old, "train.epochs": 2.0}, 48)
    assert "linear over 91 steps" in line and "linear over 181" in line


@pytest.mark.parametrize(
    "old, new",
    [
        ({"optim.schedule": "cosine"}, {"optim.schedule": "cosine"}),
        ({"train.steps": 100}, {"train.steps": 1000}),  # constant
        ({"train.steps": 100}, {"train.steps": 0, "train.images": 1600}),  # the same length
    ],
)
def test_a_rate_that_stays_is_not_mentioned(old, new):
    assert told(old, new, 50) == []


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 1e-3),
        ("weight_decay", 0.1),
        ("warmup_steps", 7),
        ("b1", 0.5),
        ("b2", 0.5),
        ("eps", 1e-6),
        ("clip_norm", 2.0),
    ],
)
def test_what_changes_the_step_alone_is_told_in_a_line(field, value):
    old, new = tiny.settings().to_dict(), tiny.settings({f"optim.{field}": value}).to_dict()
    assert compatibility.mismatches(old, new, compatibility.CONTINUES) == []
    schedule = {"optim.schedule": "cosine", "train.steps": 100}
    lines = told(schedule, {**schedule, f"optim.{field}": value}, 24)
    assert f"optim.{field}: {old['optim'][field]} before, {value} from step 24 on" == lines[0]
    assert len(lines) == 1 + (field == "warmup_steps")  # which moves the end of the decay


def test_another_schedule_is_told_with_its_rate():
    first, second = told({"train.steps": 100}, {"optim.schedule": "linear", "train.steps": 100}, 50)
    assert first == "optim.schedule: 'constant' before, 'linear' from step 50 on"
    assert "was constant over 100 steps, and is linear over 100" in second


@pytest.mark.parametrize("field, value", [("optim.clip_norm", 0.0), ("train.spike_factor", 10.0)])
def test_what_turns_a_part_of_the_state_on_or_off_is_refused(field, value):
    old, new = tiny.settings().to_dict(), tiny.settings({field: value}).to_dict()
    for pair in ((old, new), (new, old)):
        (line,) = compatibility.mismatches(*pair, compatibility.CONTINUES)
        assert line.startswith(f"{field}: ")
