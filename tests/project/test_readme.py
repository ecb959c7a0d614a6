"""All that the README, results and recipes show works: commands, examples, links."""

import re
import shlex
import subprocess
import sys

import commands
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from places import ROOT
from readme import EXTENDING, README, RESULTS, blocks, example, text
from tiers import slow_but

from configs import digits
from ig_jax import experiment, modes
from ig_jax.config import run_config
from ig_jax.data import SOURCES
from ig_jax.generation import batches
from ig_jax.objectives import TERMS
from ig_jax.programs import dry_run
from ig_jax.samplers import SAMPLERS
from ig_jax.training import trainer

PAGES = sorted((ROOT / "docs").glob("*.md"))


def shown() -> list[list[str]]:
    """The words of every command; of an images' folder there is one that stands here for it."""
    every = blocks("bash", README, RESULTS)
    lines = [line.split("#")[0].strip() for block in every for line in block.split("\n")]
    return [shlex.split(line.replace("path=photos", "path=docs")) for line in lines if line]


def is_program(words: list[str]) -> bool:
    return words[:2] == ["python", "main.py"]


# But for those that take the config of a workdir, as test_cli shows.
PROGRAMS = [w[2:] for w in shown() if is_program(w) and any(x.startswith("--config=") for x in w)]


OTHERS = [words for words in shown() if not is_program(words)]


def harmless(words: list[str]) -> list[str]:
    """The command in the form that checks everything and computes nothing."""
    if words[0] == "make":
        return ["make", "--dry-run", *words[1:]]
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        return [sys.executable, *words[1:], "--help"]
    raise ValueError(f"a page shows {words!r}, which no rule here knows how to try")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("words", PROGRAMS, ids=" ".join)
def test_a_program_of_the_readme_can_be_started(words, monkeypatch, capsys):
    monkeypatch.setattr(modes, "describe", lambda exp: f"{exp.total_steps} steps")
    status = commands.run_here([*words, "--dry_run"], monkeypatch)
    assert status == 0, capsys.readouterr().err


@pytest.mark.slow
def test_the_programs_of_the_readme_trace():
    dry = [[*words, "--dry_run"] for words in PROGRAMS]
    for words, (status, _, err) in zip(dry, commands.run(dry, ROOT), strict=True):
        assert status == 0, f"{words}: {err}"


@pytest.mark.parametrize(
    "words",
    slow_but(
        ["python benchmarks/train.py", *(" ".join(w) for w in OTHERS if w[0] == "make")],
        *(OTHERS, " ".join),
    ),
)
def test_command_of_the_readme_is_accepted(words):
    done = subprocess.run(harmless(words), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_are_found():
    assert len(shown()) >= 25 and len(PROGRAMS) >= 20


def tiny() -> ConfigDict:
    c = digits.get_config()
    c.model.depth, c.model.hidden_size, c.model.unroll = 3, 16, 1
    c.train.steps, c.train.batch_size, c.train.steps_per_dispatch = 2, 4, 1
    c.log.every_steps, c.log.samples_every_steps = 1, 0
    c.sample.batch_size = 4
    c.sample.sampler.num_steps = 2
    return c


@pytest.mark.slow
def test_term_of_the_readme_trains(monkeypatch, tmp_path):
    monkeypatch.setitem(TERMS, "huber", example("Huber"))
    c = tiny()
    c.objective.terms.huber = ConfigDict({"weight": 0.1, "delta": 1.0})
    trainer.run(experiment.experiment(run_config.parse(c, jax.device_count())), tmp_path)
    assert '"loss/huber"' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_term_of_the_readme_with_a_head_trains_it(monkeypatch, tmp_path):
    monkeypatch.setitem(TERMS, "probe", example("Probe"))
    c = tiny()
    c.objective.terms.probe = ConfigDict({"weight": 0.1, "depth": 2})
    exp = experiment.experiment(run_config.parse(c, jax.device_count()))
    outcome = trainer.run(exp, tmp_path)
    assert '"loss/probe"' in (tmp_path / "metrics.jsonl").read_text()
    assert np.any(outcome.state.terms["probe"]["kernel"])


def test_sampler_of_the_readme_samples(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "midpoint", example("Midpoint"))
    c = tiny()
    c.sample.sampler = ConfigDict({"name": "midpoint", "num_steps": 3})
    exp = experiment.experiment(run_config.parse(c, jax.device_count()))
    assert "Midpoint, 3 steps, 10 network evaluations" in dry_run.describe(exp)
    params = jax.jit(exp.net.init)(jax.random.key(0))
    [(_, images, _)] = batches.sample_batches(exp.pipeline.generator(), params, 0, np.arange(4))
    assert images.shape == (4, 8, 8, 1)


@pytest.mark.slow
def test_source_of_the_readme_trains(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images, labels=np.arange(12) % 3)
    monkeypatch.setitem(SOURCES, "npz", example("Npz"))
    c = tiny()
    c.data.source = ConfigDict({"name": "npz", "path": str(tmp_path / "pictures.npz")})
    exp = experiment.experiment(run_config.parse(c, jax.device_count()))
    assert exp.net.latent_shape == (4, 4, 3) and exp.num_classes == 3
    assert trainer.run(exp, tmp_path / "run").finished


@pytest.mark.parametrize("page", [README, *(str(p.relative_to(ROOT)) for p in PAGES)])
def test_files_that_a_page_links_to_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text(page))
    assert all(((ROOT / page).parent / link).exists() for link in links), links


def test_links_are_found():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text(README))
    assert len(links) >= 15 and EXTENDING in links and RESULTS in links
