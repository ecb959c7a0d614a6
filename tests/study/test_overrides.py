"""Configs with changes: what is merged, replaced, removed and refused; and the way back."""

import copy

import pytest

from configs import digits
from ig_jax.study.overrides import difference, merged

CONFIG = {
    "model": {"depth": 6, "readouts": (2,)},
    "objective": {"terms": {"flow": {"weight": 1.0}, "sra2": {"weight": 0.7, "depth": 2}}},
    "sampler": {"name": "euler", "num_steps": 20},
}


def test_sections_are_merged_and_values_replaced():
    changes = {"model": {"readouts": ()}, "objective": {"terms": {"sra2": {"depth": 3}}}}
    before = copy.deepcopy(CONFIG)
    found = merged(CONFIG, changes)
    assert found["model"] == {"depth": 6, "readouts": ()}
    assert found["objective"]["terms"]["sra2"] == {"weight": 0.7, "depth": 3}
    assert found["sampler"] == CONFIG["sampler"] and before == CONFIG


def test_none_removes_a_field_and_only_one_that_is_there():
    changes = {"objective": {"terms": {"flow": None, "layersync": {"weight": 0.2}}}}
    found = merged(CONFIG, changes)["objective"]["terms"]
    assert list(found) == ["sra2", "layersync"]
    with pytest.raises(ValueError, match=r"^objective.terms.flo = None: there is no such field"):
        merged(CONFIG, {"objective": {"terms": {"flo": None}}})


def test_a_section_of_another_name_takes_the_place_of_the_old_one():
    other = {"name": "dopri5", "rtol": 0.1}
    assert merged(CONFIG, {"sampler": other})["sampler"] == other
    same = {"name": "euler", "num_steps": 7}
    assert merged(CONFIG, {"sampler": same})["sampler"] == same
    assert merged(CONFIG, {"sampler": {"num_steps": 7}})["sampler"]["name"] == "euler"


@pytest.mark.parametrize("variant", ["no_readout", "accelerated", "lightningdit", "dit", "dts"])
def test_a_difference_makes_the_one_config_of_the_other(variant):
    one, other = (digits.get_config(v).to_dict() for v in ("sit", variant))
    assert merged(one, difference(one, other)) == other
    assert merged(other, difference(other, one)) == one
    assert difference(other, other) == {}


def test_a_difference_holds_nothing_else():
    sra2 = digits.get_config("sra2").to_dict()
    found = difference(digits.get_config().to_dict(), sra2)
    assert found == {"objective": {"terms": {"sra2": sra2["objective"]["terms"]["sra2"]}}}
