"""Everything the README shows works: its commands, its examples, its links."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import lively
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from configs import digits
from ig_jax import build, config, describe, sample, train
from ig_jax.data import SOURCES
from ig_jax.interop import names
from ig_jax.objectives import TERMS
from ig_jax.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.split("\n")]
    return [line for line in lines if line]


def harmless(command: str) -> list[str]:
    """The command in the form that checks everything and computes nothing."""
    words = shlex.split(command)
    if words[0] == "make":
        return ["make", "--dry-run", *words[1:]]
    if words[:2] == ["python", "main.py"]:
        return [sys.executable, *words[1:], "--dry_run"]
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        return [sys.executable, *words[1:], "--help"]
    raise ValueError(f"README.md shows {command!r}, which no rule here knows how to try")


def on_files(command: str) -> bool:
    """Whether the command needs files that only a run of the ones before it makes."""
    return "ig_sit_xl" in command


def test_the_way_of_a_published_checkpoint_in_the_readme_works_on_a_small_one(tmp_path):
    save_file(
        names.to_published(lively.parameters(lively.make(qk_norm=True, readouts=(2,)))),
        tmp_path / "ig_sit_xl.safetensors",
    )
    for command in filter(on_files, commands()):
        words = shlex.split(command.replace("ig_sit_xl.pt", "ig_sit_xl.safetensors"))
        words = [word.replace("readout_depth=8", "readout_depth=2") for word in words]
        words = [word.replace("=runs/", f"={tmp_path}/runs/") for word in words]
        words = [word.replace("=ig_sit_xl.s", f"={tmp_path}/ig_sit_xl.s") for word in words]
        small = ["--config.sample.num=2", "--config.sample.sampler.num_steps=2"]
        done = subprocess.run(
            [sys.executable, *words[1:], *(small if "--mode=sample" in words else [])],
            **{"cwd": ROOT, "capture_output": True, "text": True},
        )
        assert done.returncode == 0, done.stderr
    assert "2 samples of step 0" in done.stdout or (tmp_path / "ig_sit_xl.json").exists()


@pytest.mark.parametrize("command", [c for c in commands() if not on_files(c)])
def test_command_of_the_readme_is_accepted(command):
    done = subprocess.run(harmless(command), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_are_found():
    assert len(commands()) >= 10


def example(name: str) -> type:
    """The class `name` that a python block of the README defines."""
    [block] = [b for b in blocks("python") if f"class {name}" in b]
    # A module of its own: dataclasses look up annotations through the module's name.
    module = type(sys)(f"readme_{name.lower()}")
    sys.modules[module.__name__] = module
    exec(compile(block, "README.md", "exec"), module.__dict__)
    return getattr(module, name)


def tiny() -> ConfigDict:
    c = digits.get_config()
    c.model.depth, c.model.hidden_size, c.model.unroll = 3, 16, 1
    c.train.steps, c.train.batch_size, c.train.steps_per_dispatch = 2, 4, 1
    c.log.every_steps, c.log.samples_every_steps = 1, 0
    c.sample.batch_size = 4
    c.sample.sampler.num_steps = 2
    return c


def test_term_of_the_readme_trains(monkeypatch, tmp_path):
    monkeypatch.setitem(TERMS, "huber", example("Huber"))
    c = tiny()
    c.objective.terms.huber = ConfigDict({"weight": 0.1, "delta": 1.0})
    train.run(build.experiment(config.parse(c, jax.device_count())), tmp_path)
    assert '"loss/huber"' in (tmp_path / "metrics.jsonl").read_text()


def test_sampler_of_the_readme_samples(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "midpoint", example("Midpoint"))
    c = tiny()
    c.sample.sampler = ConfigDict({"name": "midpoint", "num_steps": 3})
    exp = build.experiment(config.parse(c, jax.device_count()))
    assert "Midpoint, 3 steps, 10 network evaluations" in describe.describe(exp)
    params = jax.jit(exp.net.init)(jax.random.key(0))
    [(_, images, _)] = sample.batches(sample.Generator(exp), params, 0, np.arange(4))
    assert images.shape == (4, 8, 8, 1)


def test_source_of_the_readme_trains(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images, labels=np.arange(12) % 3)
    monkeypatch.setitem(SOURCES, "npz", example("Npz"))
    c = tiny()
    c.data.source = ConfigDict({"name": "npz", "path": str(tmp_path / "pictures.npz")})
    exp = build.experiment(config.parse(c, jax.device_count()))
    assert exp.net.latent_shape == (4, 4, 3) and exp.num_classes == 3
    assert train.run(exp, tmp_path / "run").finished


def test_files_the_readme_links_to_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
