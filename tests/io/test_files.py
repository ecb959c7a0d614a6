"""Reading and replacing files: pipes, devices, deep and doubled JSON, and what a crash leaves."""

import json
import os
import socket
from pathlib import Path

import pytest

from ig_jax.errors import LONGEST_SHOWN, UserError, listed, shown
from ig_jax.io import files


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"\x00 bytes \xff")
    (tmp_path / "link").symlink_to("a")
    assert files.read_bytes(tmp_path / "a") == b"\x00 bytes \xff"
    assert files.read_bytes(tmp_path / "link") == b"\x00 bytes \xff"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "a folder"),
        (make_pipe, "a named pipe"),
        (make_link_to_device, "a device"),
        pytest.param(
            make_socket, "a socket", marks=pytest.mark.filterwarnings("ignore::ResourceWarning")
        ),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    make(Path("it"))
    with pytest.raises(UserError, match=f"^it: is {kind}; name a regular file$"):
        files.read_bytes("it")


@pytest.mark.parametrize("name", ["absent", "nul\x00byte", "x" * 5000])
def test_a_file_that_cannot_be_opened_is_named(name):
    with pytest.raises(UserError, match="cannot be read"):
        files.read_bytes(name)


def test_json_is_read(tmp_path: Path):
    value = {"a": [1, 2.5, None, "text"], "b": {"c": True}}
    files.write_json(tmp_path / "v.json", value)
    assert files.read_json(tmp_path / "v.json") == value


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is cut off or no JSON"),
        (b'{"a": ', "is cut off or no JSON"),
        (b"\xff\xfe{}", "is cut off or no JSON"),
        (b"\0" * 4096, "is cut off or no JSON"),
        (b"[" + b"1" * 5000 + b"]", "is cut off or no JSON"),
        (b"[" * 100_000, "is nested more than 64 levels deep"),
        (b"[" * 65 + b"]" * 65, "is nested more than 64 levels deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "is nested more than 64 levels deep"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "names 'b' twice"),
    ],
)
def test_json_that_is_not_sound_is_refused_by_name(content, complaint):
    with pytest.raises(UserError, match=f"^place: {complaint}"):
        files.parse_json(content, "place")


def test_json_may_be_as_deep_as_the_bound():
    depth = files.DEEPEST
    assert files.parse_json("[" * depth + "]" * depth, "place") == json.loads(
        "[" * depth + "]" * depth
    )


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "f"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.replaced(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events = []

    def synced(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def moved(old: Path, new: Path, replace=os.replace) -> None:
        events.append(("move", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    files.write_text(tmp_path / "f", "text")
    assert events == [("sync", ".f.tmp"), ("move", "f"), ("sync", tmp_path.name)]


def test_long_values_are_cut_in_messages():
    assert shown({"a": 1}) == "{'a': 1}"
    assert shown("x" * 10_000) == "'" + "x" * (LONGEST_SHOWN - 1) + "... (10,002 characters)"
    assert shown(10**5000) == "a number of 16,610 bits"
    assert shown([10**5000]) == "a list with a number of thousands of digits"
    assert listed(["a", 1]) == "'a', 1"
    assert listed([]) == "nothing"
    assert listed(["x" * 50] * 100) == (("'" + "x" * 50 + "', ") * 4)[:LONGEST_SHOWN] + "..."
