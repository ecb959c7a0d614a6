"""From a published file to a run and back, for every family and what a file may leave open.

A run is made without its checkpoint, which other tests write and read: what is imported, as a
config and parameters, is exported from there.
"""

import functools

import lively
import numpy as np
import pytest
from published_variants import (
    AP_HEAD,
    CLASSES,
    DATA_FIRST,
    HEADS,
    LABELS,
    NOISE_FIRST,
    PROJECTORS,
    drawn,
    lightningdit,
    run_of,
    sit,
)

from ig_jax.errors import UserError
from ig_jax.interop import declared, original, parameter_names
from ig_jax.interop.detect import detect
from ig_jax.io import state_dict
from ig_jax.programs import export_checkpoint

# Family -> how its file is made, and what must be said of it at this size.
HEADS_TOLD = {"num_heads": HEADS}
FAMILIES = {
    "sit_official": (lambda **k: sit(**{"sigma": True} | k), {"family": "sit"} | HEADS_TOLD),
    "sit_ig": (lambda **k: sit(readout=True, **k), {"readout_depth": 1} | HEADS_TOLD),
    "repa": (lambda **k: sit(extra=PROJECTORS, **k), HEADS_TOLD),
    "sra_sit": (lambda **k: sit(extra=AP_HEAD, **k), HEADS_TOLD),
    "dit": (lambda **k: sit(**{"sigma": True} | k), {"family": "dit"} | HEADS_TOLD),
    "sra_dit": (lambda **k: sit(**{"sigma": True, "extra": AP_HEAD} | k), HEADS_TOLD),
    "lightningdit": (lightningdit, {}),
    "lightningdit_ig": (lambda **k: lightningdit(readout=True, **k), {"readout_depth": 1}),
}
# (family, variant) -> what must be said besides, or how it is refused.
SAID = {
    ("sit_official", "no_sigma"): {"time_direction": NOISE_FIRST},
    ("sit_ig", "sigma"): {"family": "sit", "time_direction": DATA_FIRST},
    ("repa", "sigma"): {"family": "sit", "time_direction": DATA_FIRST},
}
REFUSED = {
    ("sra_sit", "sigma"): {"family": "sit"},  # is taken for SRA's DiT
    ("dit", "no_sigma"): {},
    ("sra_dit", "no_sigma"): {"family": "dit"},
}
VARIANTS = {
    "plain": {},
    "sigma": {"sigma": True},
    "no_sigma": {"sigma": False},
    "no_null_class": {},
    "qk_norm": {"qk_norm": True},
    "rope_only": {"options": {"swiglu": False, "rms_norm": False}},
    "odd_sizes": {"width": 20, "heads": 5},
}


def cases():
    for family in FAMILIES:
        always_sigma = family in ("sit_official", "dit", "sra_dit")
        for variant in VARIANTS:
            known = variant != ("sigma" if always_sigma else "no_sigma")
            if known and (variant != "rope_only" or family.startswith("lightningdit")):
                yield family, variant


def case(family, variant):
    """(state dict, its flags) of a family of published files in a variant."""
    make, said = FAMILIES[family]
    state, _ = make(**VARIANTS[variant])
    said = said | SAID.get((family, variant), {})
    if variant == "no_null_class":
        state[LABELS] = state[LABELS][:-1]
        said = said | {"num_classes": CLASSES}
    if variant == "odd_sizes" and "num_heads" in said:
        said = said | {"num_heads": 5}
    return state, said


ROUND = [c for c in cases() if c not in REFUSED]


def through_a_file(exported, folder):
    """What --mode=import finds in the exported file without a flag."""
    state_dict.write_safetensors(
        folder / "out.safetensors", exported.state, declared.to_metadata(exported.declared)
    )
    read = state_dict.read(folder / "out.safetensors", "--checkpoint")
    return detect(read.state, declared.of_metadata(read.metadata))


def same(found, again):
    """Equal networks: settings, classes, and all parameters to the last bit."""
    assert again.model == found.model
    assert (again.side, again.channels, again.classes) == (
        found.side,
        found.channels,
        found.classes,
    )
    assert again.state.keys() - set(parameter_names.DERIVED) == found.state.keys() - set(
        parameter_names.DERIVED
    )
    for name in found.state:
        if name not in parameter_names.DERIVED:
            np.testing.assert_array_equal(again.state[name], found.state[name], err_msg=name)


@functools.cache
def compiled(net):
    return lively.compile_quickly(net)


def outputs(net, params, t=lambda t: t):
    """(prediction, early one) at the same points for every network."""
    x, times, y = lively.inputs(net)
    out = compiled(net)(params, x, t(times), y)
    return [out.pred, *out.heads.values()]


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[1] == "odd_sizes" else ())
        for case in ROUND
    ],
)
def test_a_published_file_comes_back_as_it_was(family, variant, tmp_path):
    state, said = case(family, variant)
    found = detect(state, declared.of_flags(**said))
    run, _ = run_of(found)
    kept = original.of(state, found)
    exported = export_checkpoint.form(run, kept, "ema", "out.safetensors")
    assert exported.state.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(exported.state[name], array, err_msg=name)
    same(found, through_a_file(exported, tmp_path))
    # Trained on, it comes back as it is here, without what was not trained.
    trained = run._replace(meta={**run.meta, "step": 3})
    exported = export_checkpoint.form(trained, kept, "ema", "out.safetensors")
    again = through_a_file(exported, tmp_path)
    same(found, again)
    assert again.declared.label_drop == (0.0 if variant == "no_null_class" else 0.1)
    assert len(exported.state[LABELS]) == CLASSES + (variant != "no_null_class")
    left_out = family in ("sit_official", "repa", "sra_sit", "sra_dit") or variant == "sigma"
    left_out &= variant != "no_sigma"
    assert ("not in the class it was imported from" in exported.card) == left_out


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_scale_of_time_comes_back_and_no_published_class_takes_the_file(family, tmp_path):
    state, said = case(family, "plain")
    found = detect(state, declared.of_flags(**said))
    run, params = run_of(found, step=3, imported="", time_scale=1000.0)
    exported = export_checkpoint.form(run, None, "ema", "out.safetensors")
    assert "ig_jax_only.time_scale" in exported.state
    assert "no published class: none has these settings: time_scale" in exported.card
    assert "times 1000 before its features" in exported.card
    again = through_a_file(exported, tmp_path)
    assert again.model == found.model | {"time_scale": 1000.0}
    if family in ("sit_ig", "lightningdit"):
        back, weights = run_of(again)
        other = outputs(run_of(found)[0].exp.net, params)
        for one, two, three in zip(
            outputs(run.exp.net, params), outputs(back.exp.net, weights), other, strict=True
        ):
            np.testing.assert_array_equal(one, two)
            assert np.abs(one - three).max() > 0.01
    with pytest.raises(UserError, match="exported with ig_jax_only.time_scale, which no published"):
        detect(exported.state, declared.of_flags(**said))


@pytest.mark.parametrize(("family", "variant"), REFUSED)
def test_networks_that_are_not_built_are_refused_by_name(family, variant):
    state, said = case(family, variant)
    with pytest.raises(UserError, match=r"is a dit by its names|learned no variance"):
        detect(state, declared.of_flags(**said | REFUSED[family, variant]))


# What a file computes, said without the code under test: t in the file, and the sign of ours.
def backwards(t):
    return 1 - t


def as_it_is(t):
    return t


COMPUTED = [
    ("sit_official", "plain", {}, backwards, -1),
    ("sit_official", "no_sigma", {}, backwards, -1),
    ("sit_official", "plain", {"prediction": "noise"}, backwards, 1),
    ("sit_official", "no_sigma", {"time_direction": DATA_FIRST}, as_it_is, 1),
    ("sit_ig", "plain", {}, as_it_is, 1),
    ("sit_ig", "plain", {"time_direction": NOISE_FIRST}, backwards, -1),
    ("dit", "plain", {}, as_it_is, 1),
    # Our LightningDiT turns time and sign of its weights' network by itself.
    ("lightningdit_ig", "plain", {}, as_it_is, 1),
    ("lightningdit", "sigma", {}, as_it_is, 1),
    ("lightningdit", "plain", {"time_direction": DATA_FIRST}, backwards, -1),
    ("lightningdit", "plain", {"prediction": "score"}, as_it_is, -1),
]


@pytest.mark.parametrize(("family", "variant", "more", "time", "sign"), COMPUTED)
def test_an_imported_network_computes_what_the_file_does(family, variant, more, time, sign):
    state, said = case(family, variant)
    found = detect(state, declared.of_flags(**said | more))
    run, params = run_of(found)
    _, file_net = FAMILIES[family][0](**VARIANTS[variant])
    theirs = drawn(file_net)
    for ours, expected in zip(
        outputs(run.exp.net, params), outputs(file_net, theirs, time), strict=True
    ):
        # What float32 leaves of two sums over 256 features in another order.
        np.testing.assert_allclose(ours, sign * expected, rtol=0, atol=1e-5 * np.abs(ours).max())
