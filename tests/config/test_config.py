"""Parsing a config: what comes out, and what every field and section refuses alike.

Missing, unknown and of another type: each is tried on every field. The rules that single fields
have are in test_config_rules.py.
"""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict, config_dict

from configs import base, digits
from ig_jax import pytree
from ig_jax.config import run_config
from ig_jax.config.run_config import ConfigError
from ig_jax.data import SOURCES
from ig_jax.errors import UserError

# As records hold it: 0 and '' stand for the fields that are not set.
LEAVES = pytree.flatten(run_config.parse(digits.get_config()).raw)
UNSET = [p for p, value in pytree.flatten(base.get_config().to_dict()).items() if value is None]
# What a search tries is free to hold any of the settings below `sample`: it has rules of its own.
TRIED = "search.space.values."
# Fields that a config may leave out, and the value that they then have.
OPTIONAL = {
    "process.prediction": "velocity",
    "process.time_mean": 0.0,
    "process.time_std": 1.0,
    "sample.ig.channels": 0,
    "sample.cfg.channels": 0,
    "sample.autoguidance.channels": 0,
    "sample.files": ("png", "npz"),
    "sample.token_groups.share": 0.0,
    "sample.token_groups.each_step": False,
    "sample.null_class.every_steps": 1,
    "sample.null_class.readout": None,
    "evaluate.reference": None,
    "evaluate.second_reference": None,
    "evaluate.samples": None,
    "evaluate.while_training.loss_every_steps": 0,
    "train.only": None,
    "train.ema_warmup_power": 0.0,
    "train.ema_sigma_rel": (),
    "checkpoint.averages_every_steps": 0,
    "objective.teacher_decay": None,
    "objective.groups.shares": (),
    "objective.groups.dual_time": False,
    "objective.groups.separate_attention": False,
    "objective.groups.full_sample_prob": 0.0,
}
REQUIRED = [path for path in LEAVES if path not in OPTIONAL and not path.startswith(TRIED)]
SECTIONS = sorted({p.rpartition(".")[0] for p in LEAVES if "." in p and not p.startswith(TRIED)})


def parse(changes=None, devices=2, without=()):
    """The tiny config, changed, parsed; `without` names fields to leave out."""
    values = tiny.settings(changes or {}).to_dict()
    for path in without:
        *parents, name = path.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        del section[name]
    return run_config.parse(ConfigDict(values), devices=devices)


def refusal(changes=None, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(changes, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_digits_config_parses_to_the_values_in_its_file():
    written = digits.get_config()
    parsed = run_config.parse(written, devices=2)
    assert parsed.model.readouts == written.model.readouts
    assert parsed.readout == written.model.readouts[0]
    assert parsed.latent_shape == (8, 8, 1)
    assert parsed.sample.sampler.num_steps == written.sample.sampler.num_steps
    assert parsed.sample.cfg.scale == written.sample.cfg.scale
    assert parsed.objective.terms["internal_guidance"].weight == 0.5
    written = pytree.flatten(written.to_dict())
    assert pytree.flatten(parsed.raw) == {
        p: LEAVES[p] if p in UNSET else written[p] for p in written
    }


def test_a_named_readout_is_the_one_that_guides():
    changes = {"model.depth": 4, "model.readouts": (3, 1), "sample.readout": 1}
    assert parse(changes).readout == 1
    assert parse({**changes, "sample.readout": None}).readout == 3


def test_nothing_parsed_can_be_changed_afterwards():
    parsed = parse()
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.train.steps = 1
    with pytest.raises(TypeError):
        parsed.objective.terms["flow"] = None


def test_a_mistake_is_a_user_error():
    assert issubclass(ConfigError, UserError)


def test_a_whole_number_stands_for_a_float():
    assert parse({"optim.weight_decay": 1}).optim.weight_decay == 1.0


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_refuses_a_value_of_no_type_by_its_name(path):
    value = [None] if path in UNSET else None
    assert re.match(
        rf"{re.escape(path)}\b.*= .*None.*: (must be|no such name)", refusal({path: value})
    )


@pytest.mark.parametrize("path", [p for p, v in LEAVES.items() if type(v) in (int, float)])
def test_every_number_refuses_a_truth_value_and_a_word(path):
    kind = type(LEAVES[path]).__name__
    for value in (True, "many"):
        assert refusal({path: value}) == f"{path} = {value!r}: must be of type {kind}"


@pytest.mark.parametrize("path", [p for p, v in LEAVES.items() if type(v) is int])
def test_every_whole_number_refuses_a_fraction(path):
    assert refusal({path: 1.5}) == f"{path} = 1.5: must be of type int"


def _of_kind(kind: type) -> list[str]:
    """Fields that hold values of this type, or tuples of them."""
    held = {p: v[:1] if isinstance(v, tuple) else (v,) for p, v in LEAVES.items()}
    return [path for path, values in held.items() if values and type(values[0]) is kind]


def _in_its_place(path: str, value):
    return (value,) if isinstance(LEAVES[path], tuple) else value


@pytest.mark.parametrize("path", _of_kind(float))
def test_every_number_is_finite_in_float32(path):
    for value in (math.nan, math.inf, -math.inf, 1e300, 10**400, -1e38):
        message = refusal({path: _in_its_place(path, value)})
        assert message.startswith(f"{path} = ") and "must be finite, and at most 1e+37" in message
        assert len(message) < 400


@pytest.mark.parametrize("path", _of_kind(float))
def test_every_number_that_is_not_0_is_none_in_float32_either(path):
    for value in (5e-324, -1e-40):
        assert "is nearly 0" in refusal({path: _in_its_place(path, value)})


@pytest.mark.parametrize("path", _of_kind(int))
def test_every_whole_number_has_bounds(path):
    for value, rule in ((10**20, "at most"), (-(2**63), "at least"), (10**5000, "at most")):
        message = refusal({path: _in_its_place(path, value)})
        assert message.startswith(f"{path} = ") and f": must be {rule} " in message
        assert len(message) < 400


@pytest.mark.parametrize("path", [p for p in _of_kind(str) if not p.endswith("name")])
def test_every_text_is_printable_and_of_bounded_length(path):
    for value in ("a\0b", "a\nb", "\ud800"):
        message = refusal({path: _in_its_place(path, value)})
        assert message == f"{path} = {value!r}: must be text without control characters"
    message = refusal({path: _in_its_place(path, "x" * 2**21)})
    assert re.fullmatch(rf"{path} = 'x+... \(.* characters\): must not have more .*", message)
    assert len(message) < 400


@pytest.mark.parametrize("path", [p for p in LEAVES if p.endswith(".name")])
@pytest.mark.parametrize("value", [{}, [], ["sit"], (), 3, math.nan, True, "x" * 10**5])
def test_every_name_that_is_none_is_told_the_known_ones(path, value):
    message = refusal({path: value})
    assert message.startswith(f"{path} = ") and ": no such name; known: " in message
    assert len(message) < 600


@pytest.mark.parametrize("path", [p for p, v in LEAVES.items() if isinstance(v, tuple)])
def test_every_tuple_is_of_bounded_length(path):
    message = refusal({path: (1,) * 2000})
    assert re.match(
        rf"{re.escape(path)} = \(1, .*\): must not have more than 1000 entries", message
    )
    assert len(message) < 400


def test_numbers_of_numpy_are_numbers():
    changes = {"train.steps": np.int64(7), "optim.eps": np.float64(1e-3), "seed": np.uint8(3)}
    parsed = parse(
        {**changes, "model.qk_norm": np.bool_(True), "train.ema_decays": [np.float64(0.5)]}
    )
    assert (parsed.train.steps, parsed.optim.eps, parsed.seed) == (7, 1e-3, 3)
    assert parsed.model.qk_norm is True
    json.dumps(parsed.raw)  # as checkpoints keep it
    assert "must be of type int" in refusal({"train.steps": np.float32(7)})
    assert "must be finite" in refusal({"optim.eps": np.float32("inf")})
    assert "\n" not in refusal({"optim.eps": np.zeros((2, 2))})


def test_a_key_that_is_no_name_is_refused():
    for key in ("a b\n", "", "x" * 101):
        values = tiny.settings().to_dict()
        values["train"][key] = 1
        with pytest.raises(ConfigError, match="^train: .* is no name of a field"):
            run_config.parse(ConfigDict(values))


def test_sections_in_sections_without_end_are_refused():
    section = {}
    for _ in range(100):
        section = {"a": section}
    assert "lies in more than 20 sections" in refusal({"search.space.values": section})


def test_a_field_without_a_value_is_told():
    c = tiny.settings()
    c.optim.eps = config_dict.required_placeholder(float)
    with pytest.raises(ConfigError, match=r"^the config cannot be read \(.*\)$"):
        run_config.parse(c)


@pytest.mark.parametrize(("path", "value"), OPTIONAL.items())
def test_a_field_that_may_be_left_out_has_the_value_of_the_base_config(path, value):
    parsed = parse(without=[path])
    section, _, name = path.rpartition(".")
    for part in section.split("."):
        parsed = getattr(parsed, part)
    assert getattr(parsed, name) == value
    assert LEAVES[path] == value or (value is None and LEAVES[path] in ("", 0.0))


def test_a_sampler_may_leave_out_its_tolerances_and_has_those_of_its_own():
    plain = parse({"sample.sampler": {"name": "dopri5", "num_steps": 9}}).sample.sampler
    assert (plain.num_steps, plain.rtol, plain.atol) == (9, 1e-3, 1e-6)
    loose = parse({"sample.sampler": {"name": "dopri5", "num_steps": 9, "rtol": 1}}).sample.sampler
    assert (loose.rtol, loose.atol) == (1.0, 1e-6)
    assert refusal({"sample.sampler": {"name": "dopri5"}}) == (
        "sample.sampler.num_steps: missing; 'dopri5' needs it"
    )


@pytest.mark.parametrize("path", REQUIRED)
def test_every_field_is_missed_by_its_name(path):
    message = refusal(without=[path])
    assert re.match(
        rf"{re.escape(path)}( is|:) missing; (configs/base.py shows|known: |'\w+' needs it)",
        message,
    )


@pytest.mark.parametrize("path", SECTIONS)
def test_every_section_refuses_an_unknown_field_by_its_name(path):
    message = refusal({f"{path}.zzz": 1})
    assert message.startswith(f"{path}.zzz: ") and "known: " in message


@pytest.mark.parametrize("path", [*SECTIONS, TRIED.rstrip(".")])
def test_every_section_refuses_to_be_a_number(path):
    assert refusal({path: 3}) == f"{path} = 3: must be a section (a ConfigDict or dict)"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("model.dept", "'depth'? 'sit' has depth, hidden_size, "),
        ("trian", "'train'?"),
        ("sample.ig.scal", "'scale'?"),
        ("data.source.splits", "'split'? 'digits' has split"),
        ("objective.terms.flow.wieght", "'weight'? 'flow' has weight, "),
    ],
)
def test_a_misspelt_field_is_told_the_nearest_one_and_those_of_its_kind(path, hint):
    section = path.split(".")[-1] == "trian"
    found = refusal({path: {} if section else 1})
    assert found.startswith(f"{path}: unknown field; did you mean {hint}")


@pytest.mark.parametrize(
    ("path", "value", "mend"),
    [
        ("model.name", "sitt", "did you mean 'sit'?"),
        ("process.name", "flows", "did you mean 'flow'?"),
        ("data.source.name", "digit", "did you mean 'digits'?"),
        ("data.codec.name", "jpeg", "known: as_stored, identity"),
        ("optim.name", "adam", "did you mean 'adamw'?"),
        ("sample.sampler.name", "huen", "did you mean 'heun'?"),
        (
            "sample.sampler.name",
            "rk4",
            "known: adams_bashforth, ancestral, ddim, dopri5, dpmpp_2m, edm_stochastic, euler, ",
        ),
    ],
)
def test_an_unknown_name_is_told_the_known_ones(path, value, mend):
    message = refusal({path: value})
    assert message.startswith(f"{path} = {value!r}: no such name; ") and mend in message


def test_an_unknown_term_is_told_the_known_ones():
    message = refusal({"objective.terms.flows": {"weight": 1.0}})
    assert message.startswith("objective.terms.flows = 'flows': no such name; ")
    assert "did you mean 'flow'?" in message


def test_latents_that_are_not_square_are_refused(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Wide(SOURCES["digits"]):
        stored_shape = (4, 8, 1)

    monkeypatch.setitem(SOURCES, "digits", Wide)
    assert refusal() == "data: latents are 4 x 8; this model needs square ones"


def test_one_device_takes_what_two_refuse():
    assert parse({"train.batch_size": 15, "sample.batch_size": 7}, devices=1).train.batch_size == 15


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"train.steps": 7}, 7),
        ({"train.steps": None, "train.images": 33}, 3),
        ({"train.steps": None, "train.images": 32}, 2),
        ({"train.steps": None, "train.images": 1}, 1),
        ({"train.steps": None, "train.epochs": 0.5}, 46),  # 1442 images / 2 / 16, rounded up
    ],
)
def test_the_length_of_a_run_is_rounded_up_to_whole_steps(length, steps):
    assert parse(length).train.total_steps(1442) == steps


@pytest.mark.parametrize("length", [{"train.epochs": 1e30}, {"train.images": 10**12}])
def test_a_run_of_more_steps_than_can_be_counted_is_refused(length):
    train = parse({"train.steps": None, "train.batch_size": 2, **length}).train
    with pytest.raises(ConfigError, match=r"train.\w+ = 1.*: make .* steps, must not make"):
        train.total_steps(1442)
