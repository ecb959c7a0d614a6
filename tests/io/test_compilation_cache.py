"""Programs that one command compiles and the next one finds, and why there may be none."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from places import ROOT

from ig_jax import cli
from ig_jax.io import compilation_cache

# Compiles two programs; says how many were found, and in which folder.
COMPILES = """
import os
import jax
from ig_jax.io import compilation_cache
found = []
jax.monitoring.register_event_listener(
    lambda event, **_: found.append(event) if event.endswith("/cache_hits") else None
)
compilation_cache.SHORTEST_SECONDS = 0.0
assert compilation_cache.keep_programs() is None
x = jax.numpy.ones(8)
jax.jit(lambda x: jax.numpy.sin(x) @ x).lower(x).compile()
jax.jit(lambda x: jax.numpy.cos(x) * x).lower(x).compile()
print(len(found), compilation_cache.place())
"""


def compiled(caches: Path) -> tuple[int, Path]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILES],
        cwd=ROOT,
        env=environment | {"XDG_CACHE_HOME": str(caches), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found, folder = done.stdout.split(maxsplit=1)
    return int(found), Path(folder.strip())


def test_a_program_is_found_by_the_next_command_and_half_of_one_is_made_again(tmp_path):
    """A killed process leaves a program, or a part of it, without the time of its last use."""
    found, folder = compiled(tmp_path)
    whole = {path.name for path in folder.glob("*-*")}
    assert found == 0 and len(whole) >= 4 and folder.is_relative_to(tmp_path / "ig-jax")
    assert folder.stat().st_mode & 0o777 == 0o700
    half = next(folder.glob("*lambda*-cache"))
    half.write_bytes(half.read_bytes()[:100])
    half.with_name(half.name.replace("-cache", "-atime")).unlink()
    (folder / "jit_other-0123-atime").write_bytes(bytes(8))
    found, _ = compiled(tmp_path)
    assert found == len(whole) / 2 - 1
    assert {path.name for path in folder.glob("*-*")} == whole
    assert half.stat().st_size > 100


@pytest.fixture
def config(monkeypatch, tmp_path):
    """JAX's settings before anything is set, and a place for caches."""
    config = SimpleNamespace(jax_compilation_cache_dir=None, jax_enable_compilation_cache=True)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(compilation_cache, "jax", SimpleNamespace(config=config))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return config


def test_the_folder_is_of_bounded_size(config):
    assert compilation_cache.keep_programs() is None
    assert config.jax_compilation_cache_dir == str(compilation_cache.place())
    assert config.jax_compilation_cache_max_size == 2**30


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax_compilation_cache_dir", "/elsewhere"), ("jax_enable_compilation_cache", False)],
)
def test_what_the_environment_says_counts(config, tmp_path, name, value):
    config.update(name, value)
    before = vars(config).copy()
    assert compilation_cache.keep_programs() is None
    assert vars(config) == before and not (tmp_path / "caches").exists()


def test_a_relative_place_for_caches_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("", "caches"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert compilation_cache.place().is_relative_to(tmp_path / ".cache")


def a_file_in_its_place(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("")


def open_to_others(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(a_file_in_its_place, "File exists"), (open_to_others, "others may write to")],
)
def test_what_is_in_the_way_is_reported_and_nothing_is_kept(config, spoil, why):
    spoil(compilation_cache.place())
    assert why in compilation_cache.keep_programs()
    assert config.jax_compilation_cache_dir is None


def test_a_lock_that_another_process_holds_on_to_is_reported(config, monkeypatch):
    monkeypatch.setattr(compilation_cache, "PATIENCE", 0.05)
    folder = compilation_cache.place()
    folder.mkdir(parents=True, mode=0o700)
    with filelock.FileLock(folder / ".lockfile", is_singleton=False):
        assert ".lockfile" in compilation_cache.keep_programs()
    assert config.jax_compilation_cache_dir is None
    assert compilation_cache.keep_programs() is None


def test_without_a_home_folder_nothing_is_kept(config, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", homeless)
    assert compilation_cache.keep_programs() == "Could not determine home directory."


@pytest.mark.parametrize("several", [False, True])
def test_the_program_says_why_it_keeps_nothing_and_a_job_of_several_does_not_try(
    monkeypatch, capsys, several
):
    monkeypatch.setattr(cli.distributed, "several", lambda: several)
    monkeypatch.setattr(compilation_cache, "keep_programs", lambda: "no home")
    cli.keep_programs()
    line = "compiled programs are not kept for the next command: no home\n"
    assert capsys.readouterr().out == ("" if several else line)
