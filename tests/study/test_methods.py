"""Methods as experiments: what is merged and shared, and mistakes told before anything is run."""

from pathlib import Path

import pytest
import studies

from ig_jax.errors import UserError
from ig_jax.study import methods

WORKDIR = Path("study")
ON = {"autoguidance": {"scale": 2.5}}


def rows(changes=None, **study):
    exp = studies.experiment(studies.settings(changes or {}, **study))
    return methods.rows(exp, exp.config.study, WORKDIR)


def with_method(method, changes=None, name="another"):
    return rows(changes, methods={**studies.METHODS, name: method})


def test_the_baseline_comes_first_and_methods_that_need_other_runs_last():
    found = rows(baseline="sra2")
    assert list(found) == ["sra2", "plain", "guided"]
    assert [row.run for row in found.values()] == ["sra2", "plain", "plain"]
    assert [row.guide for row in found.values()] == [None, None, "sra2"]


def test_a_method_is_the_config_with_its_changes_and_without_the_study():
    found = rows()
    assert list(found["sra2"].exp.config.objective.terms) == [
        *found["plain"].exp.config.objective.terms,
        "sra2",
    ]
    assert "study" not in found["plain"].exp.config.raw
    guided = found["guided"].exp.config
    assert guided.sample.autoguidance.scale == 2.5 and guided.sample.guide.step == 4
    assert guided.objective == found["plain"].exp.config.objective


def test_a_method_that_shares_a_run_has_the_changes_of_that_run():
    found = with_method({"same_run_as": "sra2", "overrides": {"sample": {"ig": {"scale": 2.0}}}})
    assert "sra2" in found["another"].exp.config.objective.terms
    assert found["another"].exp.config.sample.ig.scale == 2.0


def test_a_seed_is_that_of_the_run_and_of_its_record():
    row = rows()["plain"]
    exp = row.of_seed(2**32 - 1)
    assert exp.config.seed == exp.config.raw["seed"] == 2**32 - 1
    assert row.exp.config.seed == 0
    assert methods.changes(row.settings(3), row.settings(4)) == ["seed: 3 there, 4 here"]


def test_what_changes_no_number_is_no_change():
    free = {"sample.batch_size": 10, "log.every_steps": 2, "train.steps_per_dispatch": 2}
    one, other = rows()["guided"], rows(free)["guided"]
    assert methods.changes(one.settings(1), other.settings(1)) == []
    for path, value in (("train.steps", 12), ("sample.sampler.num_steps", 3), ("optim.b1", 0.8)):
        assert methods.changes(one.settings(1), rows({path: value})["guided"].settings(1))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"overrides": {"model": {"dept": 3}}}, "model.dept: unknown field; did you mean 'depth'"),
        ({"overrides": {"objective": {"terms": {"sra": None}}}}, "terms.sra = None: there is no"),
        ({"overrides": studies.EARLY}, "sample.autoguidance is on: set guide to the method"),
        (
            {"guide": "sra2", "overrides": {"sample": {**ON, "guide": {"step": 5}}}},
            r"sample.guide.step = 5: runs of sra2 keep no such checkpoint; name a multiple of "
            r"checkpoint.keep_every_steps = 4, up to 8",
        ),
    ],
)
def test_a_mistake_in_a_method_names_it(method, message):
    with pytest.raises(UserError, match=f"^study.methods.another: .*{message}"):
        with_method(method)


def test_a_study_without_methods_or_baseline_says_what_is_missing():
    with pytest.raises(UserError, match="^study.methods: names none; docs/study.md"):
        rows(methods={}, baseline="")
    with pytest.raises(UserError, match="^study.baseline = None: name the method"):
        rows(baseline=None)


def test_a_block_that_a_method_does_not_have_is_not_probed():
    probed = {"measures": ("probe",), "probe": {"blocks": (2, 3), "time": 0.1}}
    with pytest.raises(UserError, match="study.methods.plain: study.probe.blocks names block 3"):
        rows(**probed)
