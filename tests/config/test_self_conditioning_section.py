"""The section `model.self_conditioning` of a config, which may be left out."""

import pytest
import tiny

from ig_jax.checkpoint import compatibility
from ig_jax.config import run_config
from ig_jax.config.run_config import ConfigError

ON = {"tap": None, "normalise": True, "scaling": "channels", "stop_gradient": False}


def parse(changes=None):
    return run_config.parse(tiny.settings(changes or {}))


def test_none_is_off_and_records_are_those_of_a_config_without_it():
    off, plain = parse({"model.self_conditioning": None}), parse()
    assert off.model.self_conditioning is plain.model.self_conditioning is None
    assert off.raw == plain.raw and "self_conditioning" not in plain.raw["model"]


def test_its_fields_are_parsed_and_recorded():
    found = parse({"model.self_conditioning": ON})
    assert (found.model.self_conditioning.tap, found.model.tap) == (None, 1)
    assert found.raw["model"]["self_conditioning"] == {**ON, "tap": 0}
    older, newer = parse().raw, found.raw
    assert compatibility.mismatches(older, newer, compatibility.CONTINUES)
    assert compatibility.mismatches(newer, older, compatibility.SAMPLES)


@pytest.mark.parametrize("name", ["tap", "normalise", "scaling", "stop_gradient"])
def test_a_field_that_is_missing_is_named(name):
    rest = {n: value for n, value in ON.items() if n != name}
    with pytest.raises(ConfigError, match=rf"model\.self_conditioning\.{name}: missing"):
        parse({"model.self_conditioning": rest})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.self_conditioning": 3}, "model.self_conditioning = 3: must be a section"),
        ({"model.self_conditioning": {**ON, "tap": 2}}, "tap = 2: must lie in 1..1, before"),
        ({"model.self_conditioning": {**ON, "tap": -1}}, "tap = -1: must lie in 1..1, before"),
        ({"model.self_conditioning": {**ON, "scaling": "all"}}, "scaling = 'all': must be one of"),
        ({"model.self_conditioning": {**ON, "pool": 1}}, "self_conditioning.pool: unknown field"),
        (
            {"objective.groups": {"shares": (0.25, 0.75), "separate_attention": True}},
            "objective.groups.separate_attention = True: model.self_conditioning pools the tokens",
        ),
        (
            {"sample.token_groups": {"share": 0.25, "each_step": False}},
            "sample.token_groups.share = 0.25: model.self_conditioning pools the tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(changes, message):
    with pytest.raises(ConfigError) as caught:
        parse({"model.self_conditioning": ON} | changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
