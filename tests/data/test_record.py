"""The record beside latents: what is written is read, and what is none is refused by its file."""

import dataclasses
import json
import os

import pytest

from ig_jax.data import provenance
from ig_jax.errors import UserError

RECORD = provenance.Record(
    codec="sd_vae",
    autoencoder="0f" * 32,
    image_size=256,
    crop="center-crop-dhariwal",
    input_range=(-1.0, 1.0),
    examples=3,
    skipped=("a.png: is cut off",),
    mean=(0.5, 1.0, -2.5),
    std=(1.0, 1.5, 2.0),
    source={"name": "image_folder", "path": "/data", "size": 256},
    versions={"jax": "0.10"},
)
MEANT = dataclasses.asdict(RECORD)


def test_what_is_written_is_read(tmp_path):
    assert provenance.read(tmp_path) is None
    (tmp_path / provenance.PROVENANCE_FILE).write_text(provenance.dumps(RECORD))
    assert provenance.read(tmp_path) == RECORD


def test_what_a_later_version_adds_is_passed_over():
    assert provenance.parse(json.dumps(MEANT | {"colour": "red"}), "f") == RECORD


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "3", '"text"', "{}", "\0" * 100, "[" * 10**5),
        *(json.dumps({k: v for k, v in MEANT.items() if k != name}) for name in MEANT),
        json.dumps(MEANT)[:-1] + ', "codec": "va_vae"}',
        json.dumps(MEANT | {"codec": None}),
        json.dumps(MEANT | {"codec": ["sd_vae"]}),
        json.dumps(MEANT | {"image_size": "256"}),
        json.dumps(MEANT | {"image_size": 256.0}),
        json.dumps(MEANT | {"examples": True}),
        json.dumps(MEANT | {"mean": 3}),
        json.dumps(MEANT | {"mean": ["3"]}),
        json.dumps(MEANT | {"std": [None]}),
        json.dumps(MEANT | {"std": [True]}),
        json.dumps(MEANT | {"skipped": [["a"]]}),
        json.dumps(MEANT | {"source": []}),
        json.dumps(MEANT | {"versions": {"jax": 1}}),
    ],
)
def test_what_is_no_record_is_refused_by_its_file(tmp_path, content):
    file = tmp_path / provenance.PROVENANCE_FILE
    file.write_text(content)
    with pytest.raises(UserError, match=f"^{file}: is cut off or no record of latents"):
        provenance.read(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / provenance.PROVENANCE_FILE)
    with pytest.raises(UserError, match="is a named pipe"):
        provenance.read(tmp_path)
