"""Fields that are not set: None in a config, 0 or '' in records and in configs of older runs."""

import json

import fuzz_configs
import pytest
import tiny
from ml_collections import ConfigDict

from configs import base, imagenet
from ig_jax import cli, pytree
from ig_jax.config import run_config

# ml_collections reads a config file in a way that Python 3.12 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# Field -> what a user may set it to.
FIELDS = {
    "train.images": 640,
    "train.epochs": 2.5,
    "train.only": "readouts",
    "study.baseline": "plain",
    "log.peak_tflops": 989.5,
    "objective.teacher_decay": 0.999,
    "sample.readout": 1,
    "sample.null_class.readout": 1,
    "sample.guide.workdir": "runs/worse",
    "sample.guide.step": 500,
    "visualize.images": "photos",
    "visualize.labels": "3,7",
    "probe.test_path": "data/val",
    "probe.test_split": "validation",
    "evaluate.samples": "samples.npz",
    "evaluate.reference": "reference.npz",
    "evaluate.second_reference": "reference-fd_dinov2.npz",
    "evaluate.features.weights": "inception.pth",
    "data.codec.weights": "vae.pt",
    "data.codec.statistics": "latents_stats.pt",
}


def get_config() -> ConfigDict:
    """The tiny run with every field that may be not set; also a file for --config."""
    c = tiny.get_config()
    c.evaluate.features = base.get_config().evaluate.features
    c.data = imagenet.va_vae("no_data")
    # Of empty sections a flat config says nothing.
    c.study.methods = ConfigDict({"plain": {"overrides": {"model": {"depth": 3}}}})
    c.select.values = ConfigDict({"model": {"depth": (2, 3)}})
    return c


def flat(config: ConfigDict) -> dict:
    return pytree.flatten(config.to_dict())


def test_these_are_the_fields_that_are_not_set_by_default():
    # Of the three lengths of a run tiny.py sets the steps.
    assert {path for path, value in flat(get_config()).items() if value is None} == set(FIELDS)
    assert base.get_config().train.steps is None


def test_0_and_an_empty_text_mean_the_same_and_stand_in_records():
    values = flat(get_config())
    older = values | {path: type(value)() for path, value in FIELDS.items()}
    parsed = [run_config.parse(ConfigDict(pytree.unflatten(v))) for v in (values, older)]
    assert parsed[0] == parsed[1]
    assert parsed[0].sample.readout is None and parsed[1].data.codec.weights is None
    records = [json.dumps(p.raw) for p in parsed]
    assert records[0] == records[1] == json.dumps(pytree.unflatten(older))


@pytest.fixture
def on_command_line():
    """What `python main.py --config=<this file> *arguments` makes of the config."""
    if not cli.FLAGS.is_parsed():
        cli.FLAGS(["main.py"])
    return lambda *arguments: fuzz_configs.parse_command_line([f"--config={__file__}", *arguments])


@pytest.mark.parametrize("path", FIELDS)
def test_the_command_line_sets_a_field_and_sets_it_back(on_command_line, path):
    setting = f"--config.{path}={FIELDS[path]}"
    assert flat(on_command_line(setting))[path] == FIELDS[path]
    empty = "" if isinstance(FIELDS[path], str) else 0
    back = on_command_line(setting, f"--config.{path}={empty}")
    assert run_config.parse(back) == run_config.parse(get_config())


def test_a_config_file_sets_a_field_back_to_none():
    c = get_config()
    c.train.images, c.train.steps = 320, None
    assert run_config.parse(c).train.total_steps(1000) == 20
    c.train.images, c.train.steps = None, 7
    assert run_config.parse(c).train.total_steps(1000) == 7
