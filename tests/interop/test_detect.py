"""What a published file leaves open is asked for or told, and what is told is held against it."""

import json
import shlex

import numpy as np
import pytest
from published_variants import (
    AP_HEAD,
    CLASSES,
    DATA_FIRST,
    LABELS,
    NOISE_FIRST,
    PROJECTORS,
    lightningdit,
    run_of,
    sit,
    with_sigma,
)

from configs import published
from ig_jax.codecs import to_uint8
from ig_jax.config.run_config import parse
from ig_jax.errors import UserError
from ig_jax.interop import declared, original, parameter_names
from ig_jax.interop.declared import Declared
from ig_jax.interop.detect import detect
from ig_jax.programs import export_checkpoint, import_checkpoint

HEADS = Declared(num_heads=2)


def said(state, flags=HEADS):
    """All that is told of an import."""
    return " | ".join(detect(state, flags).notes)


def refusal(state, flags=HEADS):
    with pytest.raises(UserError) as error:
        detect(state, flags)
    return str(error.value)


# Time.


def test_a_sit_without_marks_is_asked_for_its_direction():
    state, _ = sit()
    assert "--time_direction=noise_to_data" in refusal(state)
    assert "--time_direction=data_to_noise" in refusal(state)
    for direction in (NOISE_FIRST, DATA_FIRST):
        flags = declared.of_flags(num_heads=2, time_direction=direction)
        assert detect(state, flags).declared.time_direction == direction
        assert f"time runs from {direction.replace('_', ' ')} in the file, as given" in said(
            state, flags
        )


@pytest.mark.parametrize(
    "made", [{"extra": AP_HEAD}, {"extra": PROJECTORS}, {"readout": True}, {"qk_norm": True}]
)
def test_names_that_the_official_sit_never_has_tell_the_direction(made):
    state, _ = sit(**made)
    flags = declared.of_flags(num_heads=2, readout_depth=int("readout" in made))
    found = detect(state, flags)
    assert found.declared.time_direction == DATA_FIRST
    assert any("data to noise in the file, as in the code of REPA" in note for note in found.notes)
    assert found.declared.rounding == to_uint8.TRUNCATED


def test_contradicting_marks_are_asked_about():
    for extra in (PROJECTORS, {}):
        state, _ = sit(sigma=True, readout=not extra, extra=extra)
        flags = declared.of_flags(num_heads=2, family="sit", readout_depth=int(not extra))
        assert "in which direction its time runs" in refusal(state, flags)


def test_a_lightningdit_with_sigma_is_not_turned():
    plain, _ = lightningdit()
    state = plain | with_sigma(plain)
    found, without = detect(state), detect(plain)
    assert found.model == without.model
    for name, array in without.state.items():
        np.testing.assert_array_equal(found.state[name], array, err_msg=name)
    assert any("learned sigma dropped" in note for note in found.notes)


def test_a_dit_counts_one_way_only():
    state, _ = sit(sigma=True)
    flags = declared.of_flags(num_heads=2, family="dit", time_direction=NOISE_FIRST)
    assert "a DiT counts from data to noise" in refusal(state, flags)


# Families.

OFF = {"swiglu": False, "rope": False, "rms_norm": False, "shift": True}


@pytest.mark.parametrize(
    "options",
    [{"rope": True}, {"swiglu": True}, {"rms_norm": True}, {"shift": False}],
    ids=lambda options: next(iter(options)),
)
def test_any_of_its_options_tells_a_lightningdit(options):
    state, net = lightningdit(options=OFF | options)
    found = detect(state, declared.of_flags(num_heads=2))
    expected = {name: getattr(net.settings, name) for name in OFF}
    assert found.model.items() >= expected.items() and found.model["name"] == "lightningdit"


def test_a_lightningdit_without_options_is_what_it_is_told_to_be():
    state, _ = lightningdit(options=OFF)
    assert "in which direction" in refusal(state)
    found = detect(state, declared.of_flags(num_heads=2, family="lightningdit"))
    assert found.model["name"] == "lightningdit" and found.declared.time_direction == NOISE_FIRST


def test_rotary_tables_must_be_those_that_are_built():
    state, _ = lightningdit()
    state["feat_rope.freqs_cos"] = np.roll(state["feat_rope.freqs_cos"], 1, axis=0)
    assert "is not the table of 2 x 2 tokens with base 10000" in refusal(state, declared.UNDECLARED)


# Heads.


def test_heads_are_told_by_the_file_or_asked_for():
    for state in (sit(qk_norm=True)[0], lightningdit()[0]):
        assert detect(state).model["num_heads"] == 2
        assert "must be one number that divides it" in refusal(
            state, declared.of_flags(num_heads=4)
        )
    state, _ = sit(extra=AP_HEAD)
    assert "say --num_heads" in refusal(state, declared.UNDECLARED)
    assert detect(state, declared.of_flags(num_heads=4)).model["num_heads"] == 4
    assert "must be one number" in refusal(state, declared.of_flags(num_heads=3))


def test_a_published_size_gives_the_heads_and_that_is_told():
    small = {"width": 384, "heads": 6, "extra": AP_HEAD}
    state, _ = sit(**small)
    assert "no published network has width 384 and depth 2" in refusal(state, declared.UNDECLARED)
    blocks = {n: a for n, a in state.items() if n.startswith("blocks.0.")}
    for i in range(12):
        state |= {n.replace("blocks.0", f"blocks.{i}"): a for n, a in blocks.items()}
    assert "6 heads, as the published network of depth 12 and width 384" in said(
        state, declared.UNDECLARED
    )
    assert detect(state, declared.of_flags(num_heads=12)).model["num_heads"] == 12


# The null class.


def labels(rows):
    state, _ = sit(extra=AP_HEAD)
    return state | {LABELS: np.ones((rows, 16), np.float32)}


def test_the_null_class_is_told_or_asked_for():
    found = detect(labels(6), HEADS)
    assert found.classes == 5 and "5 classes and the null class" in said(labels(6))
    assert detect(labels(1001), HEADS).classes == 1000
    assert "say --num_classes=1000 if all are classes" in refusal(labels(1000))
    flags = declared.of_flags(num_heads=2, num_classes=7)
    assert "has 6 rows, which are 5 classes and the null class, or 6" in refusal(labels(6), flags)


def test_without_a_null_class_there_is_no_guidance_by_it():
    state = labels(6)
    found = detect(state, declared.of_flags(num_heads=2, num_classes=6))
    assert found.classes == 6 and len(found.state[LABELS]) == 7
    assert any("no null class" in note for note in found.notes)
    c = import_checkpoint.config_of(found, published.bases())
    assert (c.objective.label_drop, c.sample.cfg.scale) == (0, 1)
    c.sample.cfg.scale = 1.5
    with pytest.raises(UserError, match="needs a network trained with dropped labels"):
        parse(c)


# Damage.


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pos_embed": np.ones((1, 5, 16))}, "'pos_embed' has shape"),
        ({"pos_embed": np.ones(16)}, "'pos_embed' has shape"),
        ({"x_embedder.proj.weight": np.ones((16, 3, 2, 1))}, "'x_embedder.proj.weight' has shape"),
        ({"x_embedder.proj.weight": np.ones((0, 3, 2, 2))}, "'x_embedder.proj.weight' has shape"),
        ({"final_layer.linear.bias": np.array(1.0)}, "final_layer.linear"),
        ({"final_layer.linear.weight": np.ones((12, 3))}, "--checkpoint|final_layer"),
        ({LABELS: np.ones(6)}, "embedding_table.weight' has shape"),
        ({"blocks.0.mlp.fc1.weight": np.ones((64, 16), np.int8)}, "quantised weights are not read"),
        ({"blocks.4.mlp.fc1.weight": np.ones((64, 16))}, "lacks whole blocks: 'blocks.2'"),
        ({"extra.weight": np.ones((4, 4))}, "holds names that this network lacks: 'extra.weight'"),
    ],
)
def test_layers_of_other_shapes_are_refused_before_they_are_used(change, says):
    state, _ = sit(extra=AP_HEAD)
    try:
        found = detect(state | change, HEADS)
    except UserError as error:
        said = str(error)
    else:
        with pytest.raises(ValueError, match="values, shape") as problem:
            run_of(found)
        said = f"final_layer {problem.value}"
    assert any(part in said for part in says.split("|"))


def test_layers_that_are_missing_are_listed_at_once():
    state, _ = sit(qk_norm=True)
    gone = [
        "pos_embed",
        "blocks.1.mlp.fc1.bias",
        "blocks.0.attn.k_norm.bias",
        "final_layer.linear.bias",
    ]
    said = refusal({n: a for n, a in state.items() if n not in gone})
    assert all(repr(name) in said for name in gone)


def test_names_of_another_network_are_shown():
    said = refusal({"transformer_blocks.0.attn1.to_q.weight": np.ones((2, 2))})
    assert "no SiT, DiT or LightningDiT" in said and "transformer_blocks.0.attn1.to_q" in said


# Metadata.


def metadata(**fields):
    return {declared.ENTRY: json.dumps({"version": 1, **fields})}


def test_what_is_told_comes_through_the_metadata():
    everything = Declared(
        **{"family": "sit", "num_heads": 2, "readout_depth": 1, "time_direction": DATA_FIRST},
        **{"num_classes": 5, "path": "cosine", "prediction": "noise", "process": "flow"},
        **{"time_scale": 1000.0, "mlp_ratio": 4.0, "label_drop": 0.1, "codec": "identity"},
        rounding=to_uint8.ROUNDED,
        self_conditioning={"tap": 2, "normalise": True, "scaling": "none", "stop_gradient": True},
    )
    assert all(everything[field] is not None for field in declared.FIELDS)
    back = declared.of_metadata(declared.to_metadata(everything))
    assert all(back[field] == everything[field] for field in declared.FIELDS)
    assert back.described == set(declared.FIELDS)
    assert declared.of_metadata({"format": "pt"}) == declared.UNDECLARED


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("", "cut off or no JSON"),
        ("[" * 100_000, "nested|no JSON"),
        ("3", "is of version 3, not 1"),
        ('{"version": 2}', "is of version 2, not 1"),
        ('{"version": 1, "version": 1}', "twice"),
        ('{"version": 1, "__import__": 1}', "unknown field '__import__'"),
        ('{"version": 1, "num_heads": true}', "num_heads = True: must be a whole number above 0"),
        ('{"version": 1, "num_heads": 1e400}', "num_heads = inf"),
        ('{"version": 1, "time_scale": NaN}', "time_scale = nan"),
        ('{"version": 1, "time_scale": "1"}', "time_scale = '1': must be a number above 0"),
        ('{"version": 1, "family": ["sit"]}', "family = \\['sit'\\]: must be one of"),
        ('{"version": 1, "codec": "x"}', "codec = 'x': must be one of"),
    ],
)
def test_metadata_is_read_like_anything_from_outside(entry, says):
    with pytest.raises(UserError, match=says):
        declared.of_metadata({declared.ENTRY: entry})


def test_flags_that_contradict_the_metadata_are_refused_together():
    described = declared.of_metadata(metadata(num_heads=2, family="sit"))
    assert declared.together(declared.of_flags(num_heads=2, path="vp"), described).path == "vp"
    with pytest.raises(UserError, match="--family=dit, but .*'sit'; --num_heads=4, but .* 2"):
        declared.together(declared.of_flags(num_heads=4, family="dit"), described)


@pytest.mark.parametrize(
    "flags", [{"family": "unet"}, {"num_heads": -1}, {"time_direction": "backwards"}, {"path": "x"}]
)
def test_flags_of_no_such_value_are_refused(flags):
    with pytest.raises(UserError, match=f"--{next(iter(flags))}="):
        declared.of_flags(**flags)


# Settings that no published class has, and cards.


@pytest.mark.parametrize(
    ("make", "flags", "only"),
    [
        (lambda: sit(extra=AP_HEAD), {"path": "cosine"}, False),
        (lambda: sit(extra=AP_HEAD), {"path": "vp"}, True),
        (lambda: sit(extra=AP_HEAD), {"prediction": "score"}, True),
        (lightningdit, {"path": "vp", "prediction": "noise"}, False),
    ],
)
def test_a_process_that_no_published_class_has_marks_the_file(make, flags, only):
    state, _ = make()
    found = detect(state, declared.of_flags(num_heads=2, **flags))
    run, _ = run_of(found, step=1)
    exported = export_checkpoint.form(run, original.of(state, found), "ema", "x.safetensors")
    assert any(name.startswith(declared.ONLY) for name in exported.state) == only
    assert ("no published class" in exported.card) == only
    again = detect(exported.state, declared.of_metadata(declared.to_metadata(exported.declared)))
    c = import_checkpoint.config_of(again, published.bases())
    assert c.process.to_dict().items() >= flags.items()
    for name, array in found.state.items():
        np.testing.assert_array_equal(again.state[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("make", "flags", "time", "loads"),
    [
        (
            lambda: sit(sigma=True),
            {"family": "sit"},
            "t = 0 is noise",
            "SiT of the official code (l",
        ),
        (lambda: sit(extra=AP_HEAD), {}, "t = 0 is data", "SiT of SRA"),
        (lambda: sit(extra=PROJECTORS), {}, "t = 0 is data", "SiT of REPA"),
        (lambda: sit(sigma=True), {"family": "dit"}, "steps 0 (data)", "DiT of the official code"),
        (lightningdit, {}, "t = 0 is noise", "LightningDiT of the official code"),
    ],
)
def test_a_card_says_which_way_time_runs_and_where_the_file_loads(make, flags, time, loads):
    state, _ = make()
    found = detect(state, declared.of_flags(num_heads=2, **flags))
    run, _ = run_of(found)
    card = export_checkpoint.form(run, original.of(state, found), "ema", "a b.safetensors").card
    assert f"| time | {time}" in card and f"| loads strictly in | {loads}" in card
    assert f"--checkpoint={shlex.quote('a b.safetensors')}" in card


def test_a_lost_or_foreign_original_is_not_put_back():
    state, _ = sit(sigma=True)
    found = detect(state, declared.of_flags(num_heads=2, family="sit"))
    run, _ = run_of(found)
    kept = original.of(state, found)
    other = kept._replace(arrays=kept.arrays | {"t_embedder.mlp.0.weight": np.zeros((16, 256))})
    for origin in (None, other):
        exported = export_checkpoint.form(run, origin, "ema", "x.safetensors")
        assert len(exported.state["final_layer.linear.bias"]) == 12
        assert exported.declared.time_direction == DATA_FIRST
    assert (
        export_checkpoint.form(run, kept, "ema", "x.safetensors").declared.time_direction
        == NOISE_FIRST
    )
    assert CLASSES == found.classes and parameter_names.DERIVED[0] not in state
