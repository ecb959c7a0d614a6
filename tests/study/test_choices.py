"""Candidates of a choice: the config's own first, one for each combination, named after values."""

import pytest
import tiny

from ig_jax.config.studies import Select
from ig_jax.errors import UserError
from ig_jax.study.choices import study_of

ALIGNED = {"weight": 0.5, "depth": 1, "target_depth": 2}
RAW = tiny.settings({"objective.terms.layersync": ALIGNED}).to_dict()


def chosen(values, metric="loss"):
    return study_of(RAW, Select(values, (4, 2), metric))


def test_every_combination_is_a_method_and_the_config_s_own_is_the_baseline():
    terms = {"layersync": {"depth": (2, 1), "weight": (0.25, 0.5)}}
    found = chosen({"objective": {"terms": terms}})
    assert found.baseline == "depth=1,weight=0.5" and found.seeds == (4, 2)
    assert found.measures == ("loss",)
    assert list(found.methods) == [
        "depth=1,weight=0.5",
        "depth=2,weight=0.25",
        "depth=2,weight=0.5",
        "depth=1,weight=0.25",
    ]
    overrides = found.methods["depth=2,weight=0.25"].overrides
    assert overrides == {"objective": {"terms": {"layersync": {"depth": 2, "weight": 0.25}}}}


def test_tuples_are_values_too():
    found = chosen({"model": {"readouts": ((1,), (2,), (1, 2))}})
    assert list(found.methods) == ["readouts=1", "readouts=2", "readouts=1-2"]
    assert found.methods["readouts=1-2"].overrides == {"model": {"readouts": (1, 2)}}


def test_fields_that_end_alike_are_named_in_full():
    values = {
        "objective": {"terms": {"layersync": {"weight": (0.1,)}}},
        "sample": {"ig": {"scale": (1.0,)}, "cfg": {"scale": (1.5,)}},
    }
    name = list(chosen(values).methods)[1]
    assert name == "weight=0.1,sample.ig.scale=1,sample.cfg.scale=1.5"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "^select.values: needs 1 to 1000 combinations of values, such as"),
        ({"model": {"readouts": 3}}, r"^select.values.model.readouts = 3: must be a tuple"),
        ({"model": {"readouts": ()}}, r"^select.values.model.readouts = \(\): must be a tuple"),
        ({"model": {"redouts": ((1,),)}}, "^select.values.model.redouts: is no field that runs"),
        ({"data": {"source": {"split": ("train",)}}}, "^select.values.data.source.split: is no fi"),
        ({"model": {"readouts": ((1,),)}}, "hold nothing but the config's own setting .readouts=1"),
        ({"train": {"batch_size": tuple(range(1, 40)), "accumulation": tuple(range(40))}}, "1000"),
        ({"optim": {"learning_rate": (1e-3, 1.00000001e-3)}}, "two candidates would be called"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(values, message):
    with pytest.raises(UserError, match=message) as caught:
        chosen(values)
    assert "\n" not in str(caught.value)
