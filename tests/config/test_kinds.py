"""Kinds of sections, chosen and filled on the command line."""

import pytest
from ml_collections import ConfigDict
from places import ROOT

from configs import digits, lightningdit_xl
from ig_jax.config import kinds, run_config
from ig_jax.errors import UserError
from ig_jax.metrics import FEATURES
from ig_jax.objectives import TERMS


def changed(c: ConfigDict, *settings: str) -> ConfigDict:
    """A config after `--config.<setting>` each, of which none is left to ml_collections."""
    c.lock()
    choices, rest = kinds.chosen(["main.py", *(f"--config.{s}" for s in settings)])
    assert rest == ["main.py"]
    for choice in choices:
        choice.apply(c)
    return c


def test_a_kind_takes_the_place_of_another_with_its_own_fields():
    path = "data.source.path=/a=b"  # may hold what parts a setting from its value
    size = ("data.source.size=16", "data.source.num_classes=3", "data.source.fewer_classes=true")
    c = changed(digits.get_config(), path, "data.source.name=image_folder", *size)
    assert c.data.source.to_dict() == {
        **{"name": "image_folder", "path": "/a=b", "size": 16, "num_classes": 3},
        "fewer_classes": True,
    }
    assert c.is_locked and c.data.is_locked


def test_what_two_kinds_have_from_a_common_base_stays():
    c = changed(digits.get_config(), "sample.sampler.name=ddim", "sample.sampler.eta=0.25")
    assert c.sample.sampler.to_dict() == {"name": "ddim", "num_steps": 20, "eta": 0.25}
    options = [f"model.{name}=True" for name in ("swiglu", "rope", "rms_norm", "shift")]
    c = changed(digits.get_config(), "model.name=lightningdit", "model.readouts=1,3", *options)
    assert (c.model.depth, c.model.readouts, c.model.rope) == (6, (1, 3), True)


def test_fields_of_one_name_that_mean_other_things_do_not_stay():
    """`size` of the made-up latents is how many there are."""
    with pytest.raises(UserError, match="data.source: 'tfds_images' also needs path, split, size"):
        changed(lightningdit_xl.get_config(), "data.source.name=tfds_images")


def test_the_same_kind_keeps_its_fields_and_what_refers_to_them():
    c = lightningdit_xl.get_config("array_record")
    changed(c, "data.source.name=array_record", "data.source.path=elsewhere")
    assert c.data.codec.statistics == "elsewhere/latents_stats.pt"
    assert c.data.source.num_classes == 1000


def test_a_section_that_a_config_lacks_is_added_with_its_kind():
    settings = ("name=dinov2", "weights=w.pth")
    c = changed(digits.get_config(), *(f"evaluate.second_features.{s}" for s in settings))
    parsed = run_config.parse(c)
    assert parsed.evaluate.second_features == FEATURES["dinov2"]("w.pth")
    assert parsed.raw["evaluate"]["second_features"] == {"name": "dinov2", "weights": "w.pth"}
    assert "second_features" not in run_config.parse(digits.get_config()).raw["evaluate"]


def test_a_term_is_added_and_another_one_changed():
    terms = ("sra2.weight=0.5", "sra2.depth=2", "flow.weight=3")
    c = changed(digits.get_config(), *(f"objective.terms.{t}" for t in terms))
    parsed = run_config.parse(c).objective.terms
    assert parsed["sra2"] == TERMS["sra2"](0.5, depth=2) and parsed["flow"].weight == 3.0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["data.source.name=image_folde"], "data.source.name = 'image_folde': no such name; did"),
        (["data.source.name={}"], "data.source.name = '{}': no such name; known: array_record"),
        (
            ["data.source.name=image_folder", "data.source.path=/x"],
            "'image_folder' also needs size, num_classes; add --config.data.source.size=... --co",
        ),
        (
            ["sample.sampler.name=heun", "sample.sampler.eta=1"],
            "sample.sampler.eta: unknown field; 'heun' has num_steps",
        ),
        (["objective.terms.sra2.weight=1"], "objective.terms.sra2: 'sra2' also needs depth; add"),
        (["objective.terms.sra2.deep=1"], "deep: unknown field; 'sra2' has weight, weight_factor"),
    ],
)
def test_what_cannot_be_is_refused_with_what_there_is(settings, sentence):
    with pytest.raises(UserError) as caught:
        changed(digits.get_config(), *settings)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "rule"),
    [("x", "type int"), ("1.5", "type int"), ("9" * 5000, "type int"), ("(" * 9999, "type int")],
)
def test_a_value_of_another_type_is_left_to_the_parser(value, rule):
    c = changed(
        digits.get_config(), "sample.sampler.name=euler", f"sample.sampler.num_steps={value}"
    )
    with pytest.raises(UserError, match=f"sample.sampler.num_steps = .*: must be of {rule}"):
        run_config.parse(c)


def test_other_words_stay_in_their_order():
    words = [
        "main.py",
        "--config=c.py",
        "--config.train.steps",
        "5",
        "--config.data.codec.weights=w",
    ]
    chosen = ["--config.data.source.name", "digits", "--config.data.source.split", "held_out"]
    choices, rest = kinds.chosen([*words[:3], *words[3:4], *chosen, words[4], "--dry_run"])
    assert rest == [*words, "--dry_run"]
    assert [(c.section, c.name, c.values) for c in choices] == [
        ("data.source", "digits", {"split": "held_out"})
    ]


def test_a_flag_without_a_value_is_on():
    words = ["--config.model.name=sit", "--config.model.qk_norm", "--config.train.steps=5"]
    [choice], rest = kinds.chosen(words)
    assert (choice.values, rest) == ({"qk_norm": "true"}, words[2:])


def test_the_page_of_all_fields_is_what_the_program_lists():
    page = (ROOT / "docs" / "fields.md").read_text()
    assert page.partition("\n## ")[2] == kinds.described().partition("## ")[2]
    for section in (*kinds.named_sections(), "objective.terms.<name>"):
        assert f"\n## {section}\n" in page
