"""Paths as people write them: home folders, URLs, names that no file can have."""

import os
import pathlib
import pwd

import jax
import pytest
import tiny

from ig_jax import modes
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.io import paths

# Every path of a config, with a section in which it is one.
IN_CONFIGS = {
    "data.source.path": {"name": "image_folder", "size": 8, "num_classes": 2},
    "data.codec.weights": {"name": "sd_vae", "dtype": "float32"},
    "data.codec.statistics": {"name": "va_vae", "weights": "", "dtype": "float32"},
    "evaluate.features.weights": {"name": "inception"},
    "evaluate.reference": None,
    "evaluate.second_features.weights": {"name": "dinov2"},
    "evaluate.second_reference": None,
    "evaluate.samples": None,
    "sample.guide.workdir": None,
}


def parse(field: str, path: str) -> run_config.Config:
    """A config with this path, on made-up latents that any codec reads."""
    changes = {field: path}
    parent, _, _ = field.rpartition(".")
    if parent == "data.codec":
        channels = 64 if "statistics" in field else 8
        source = {"name": "synthetic", "side": 8, "channels": channels, "num_classes": 10}
        changes = {"data.source": source | {"size": 16}, parent: IN_CONFIGS[field], **changes}
    elif IN_CONFIGS[field] is not None:
        changes = {parent: IN_CONFIGS[field], **changes}
    return run_config.parse(tiny.settings(changes), jax.device_count())


def value(parsed: run_config.Config, field: str) -> str:
    for name in field.split("."):
        parsed = getattr(parsed, name)
    return parsed


@pytest.mark.parametrize("field", IN_CONFIGS)
def test_a_config_s_path_is_expanded_where_it_is_used_and_recorded_as_it_was_written(
    field, monkeypatch
):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    try:
        parsed = parse(field, "~/a file")
    except UserError as refusal:  # statistics and images are looked at at once
        assert "/home/of/somebody/a file" in str(refusal)
        return
    assert value(parsed, field) == "/home/of/somebody/a file"
    section = parsed.raw
    for name in field.split("."):
        section = section[name]
    assert section == "~/a file"


@pytest.mark.parametrize("field", IN_CONFIGS)
def test_a_url_in_a_config_is_refused(field):
    with pytest.raises(UserError, match=rf"{field} = 'gs://bucket/x': is a URL; mount it"):
        parse(field, "gs://bucket/x")


def test_home_folders_are_expanded_of_others_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    user = pwd.getpwuid(os.getuid())
    assert paths.given("~", "--x") == "/home/me"
    assert paths.given("~/a/~b", "--x") == "/home/me/a/~b"
    assert paths.given(f"~{user.pw_name}/a", "--x") == f"{user.pw_dir}/a"
    assert paths.given(pathlib.Path("~/a"), "--x") == "/home/me/a"


@pytest.mark.parametrize("path", ["a", "/a b/c:d", "./gs:", "c:/a", "a:b/c", "-", "ü", "a~"])
def test_any_other_path_is_left_as_it_is(path):
    assert paths.given(path, "--x") == path


@pytest.mark.parametrize(
    "path, mend",
    [
        ("gs://my-bucket/run1", "mount it as a folder \\(with gcsfuse, for example\\) or copy it"),
        ("gs:/my-bucket/run1", "is a URL; mount it"),  # what pathlib makes of it
        (" S3://bucket", "mountpoint-s3"),
        ("hdfs://namenode:9000/x", "mount it"),
        ("abfs+ssl://x", "mount it as a folder or copy it"),
        ("https://host/x.pt", "download it"),
        ("file:///data/x", "write the path alone: '/data/x'"),
        ("", "is empty; name a path"),
        (" \t", "is empty; name a path"),
        ("a\0b", "holds a NUL byte"),
        ("a/" + "b" * 300, "is longer than a name may be; choose"),
        ("a/" * 3000, "is longer than a name may be; choose"),
        ("~nobody-of-this-name/x", "there is no home folder of ~nobody-of-this-name; write ./~"),
        ("\ud800", "cannot be the name of a file"),
    ],
)
def test_what_cannot_be_a_path_here_is_refused_in_a_short_sentence(path, mend):
    with pytest.raises(UserError, match=mend) as caught:
        paths.given(path, "--x")
    assert str(caught.value).startswith("--x = ") and len(str(caught.value)) < 400


def test_a_workdir_is_expanded_and_a_url_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(modes, "_train", lambda exp, workdir, start: seen.append(workdir))
    modes.run(tiny.settings(), workdir="~/runs/x")
    assert seen == [tmp_path / "home" / "runs" / "x"]
    for mode in modes.MODES:
        with pytest.raises(UserError, match="--workdir = 'gs://b/run1': is a URL"):
            modes.run(tiny.settings(), workdir="gs://b/run1", mode=mode)
    with pytest.raises(UserError, match="--checkpoint = 's3://b/x.pt': is a URL"):
        modes.import_file("s3://b/x.pt", "runs/x", {})
    with pytest.raises(UserError, match="--output = 'gs://b/x.safetensors': is a URL"):
        modes.export_run("runs/x", "gs://b/x.safetensors", "ema")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_mode_is_refused_with_the_nearest_one(tmp_path):
    with pytest.raises(UserError, match="mode = 'smaple': no such mode; did you mean 'sample'"):
        modes.run(tiny.settings(), workdir=str(tmp_path), mode="smaple")
    with pytest.raises(UserError, match="mode = 'x': no such mode; known: demo, ema, evaluate, "):
        modes.run(tiny.settings(), workdir=str(tmp_path), mode="x")
    assert list(tmp_path.iterdir()) == []
