"""Rules of the sections `study` and `select`."""

import pytest
import studies

from ig_jax.config import run_config
from ig_jax.config.run_config import ConfigError


def refusal(**study):
    with pytest.raises(ConfigError) as caught:
        run_config.parse(studies.settings(**study))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"overides": {}}, "overides: unknown field; did you mean 'overrides'?"),
        ({"overrides": {"data": {}}}, "overrides.data: cannot differ from method to method; those"),
        (
            {"same_run_as": "plain", "overrides": {"model": {}}},
            "overrides.model: cannot differ from method to method that share a run; those that "
            "can: sample",
        ),
        (
            {"same_run_as": "plain", "init_from": "sra2"},
            "init_from = 'sra2': this method trains no run; leave out same_run_as, or this",
        ),
        ({"overrides": 3}, "overrides = 3: must be a section (a ConfigDict or dict)"),
    ],
)
def test_a_method_is_refused_by_its_name(method, message):
    found = refusal(methods={**studies.METHODS, "another": method})
    assert found.startswith(f"study.methods.another.{message}")


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"seeds": (1,)}, "study.seeds = (1,): needs at least 2, each once"),
        ({"seeds": (1, 1)}, "study.seeds = (1, 1): needs at least 2, each once"),
        ({"seeds": (1, -1)}, "study.seeds = (1, -1): each must not be negative"),
        ({"measures": ()}, "study.measures = (): needs at least one, each once"),
        ({"baseline": "nobody"}, "study.baseline = 'nobody': must be one of study.methods: guided"),
        (
            {"methods": {"plain": {}, "x": {"same_run_as": "y"}}},
            "study.methods.x.same_run_as = 'y': must be one of study.methods: plain, x",
        ),
        (
            {"methods": {**studies.METHODS, "x": {"guide": "guided"}}},
            "study.methods.x.guide = 'guided': has no run of its own; name 'plain'",
        ),
        ({"methods": {"plain": {}, "a/b": {}}}, "study.methods = 'a/b': must be letters, digits"),
        ({"probe": {"blocks": (0,), "time": 0.1}}, "study.probe.blocks = (0,): must be numbers of"),
        ({"probe": {"blocks": (1,), "time": 1.1}}, "study.probe.time = 1.1: must lie in [0, 1]"),
    ],
)
def test_a_study_is_refused_in_a_sentence(study, message):
    assert refusal(**study).startswith(message)


def test_a_record_of_a_run_keeps_what_is_removed():
    terms = {"objective": {"terms": {"internal_guidance": None}}}
    c = studies.settings(methods={**studies.METHODS, "x": {"overrides": terms}})
    raw = run_config.parse(c).raw
    assert raw["study"]["methods"]["x"]["overrides"] == terms
