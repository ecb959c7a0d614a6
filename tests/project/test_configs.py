"""Every config of configs/ parses, traces and says what it reproduces; presets are as published."""

import importlib

import jax
import numpy as np
import pytest
from places import ROOT

from ig_jax import experiment as build
from ig_jax import guidance, pytree
from ig_jax.config import run_config
from ig_jax.programs import dry_run

FOLDER = ROOT / "configs"
PARTS = {
    "__init__",
    "base",
    "imagenet",
    "published",
    "sampling",
    "workdir",
}  # what configs are made of
VARIANTS = {
    "digits": [
        "no_readout",
        "lightningdit",
        "accelerated",
        "layersync",
        "sra2",
        "dispersive",
        "contrastive",
        "sra",
        "dts",
        "self_flow",
        "self_conditioning",
        "dit",
        "study",
    ],
    "images": ["64"],
    "lightningdit_ddae_b": ["unconditional", "baseline"],
    "lightningdit_ddae_l": ["unconditional"],
    "lightningdit_xl": ["no_cfg"],
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in PARTS)
RUNS = [(name, *variant) for name in NAMES for variant in ((), *zip(VARIANTS.get(name, [])))]


def experiment(name: str, *variant: str) -> build.Experiment:
    c = importlib.import_module(f"configs.{name}").get_config(*variant)
    if name == "images":
        c.data.path = str(ROOT / "docs")  # holds two of no class
    return build.experiment(run_config.parse(c, jax.device_count()))


def traces(exp: build.Experiment) -> bool:
    text = dry_run.describe(exp)
    return "training:" in text and "network evaluations a sample" in text


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=":".join)
def test_every_config_traces_its_training_step_and_its_sampler(run):
    assert traces(experiment(*run))


def test_every_config_is_built_and_one_of_each_kind_traces():
    """One for each network and process; all of them in `make test-slow`."""
    seen = set()
    # Those for laptops last: written out block by block, they trace slowly.
    for run in reversed(RUNS):
        exp = experiment(*run)
        kind = type(exp.config.model), type(exp.config.process)
        if kind not in seen:
            seen.add(kind)
            assert traces(exp), ":".join(run)
    assert len(seen) >= 3


def test_images_are_encoded_where_that_is_asked_for():
    """It traces where the autoencoder's file is."""
    exp = experiment("images", "latents")
    assert exp.config.latent_shape == (32, 32, 4) and exp.num_classes == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_config_says_how_it_is_started(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"python main.py --config=configs/{name}.py" in text
    if name not in ("digits", "tree", "images", "emoji"):
        assert "Reproduces:" in text and "GPU hours" in text


@pytest.mark.parametrize("name", ["digits", "lightningdit_xl"])
def test_an_unknown_variant_is_told_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f":nonsense is no variant.*known: .*{VARIANTS[name][0]}"):
        importlib.import_module(f"configs.{name}").get_config("nonsense")


# Parameters of the published models with one readout, pos_embed included.
@pytest.mark.parametrize("name, count", [("sit_xl", 677_786_144), ("lightningdit_xl", 677_951_296)])
def test_full_size_models_have_as_many_parameters_as_the_published(name, count):
    assert pytree.count(experiment(name).abstract_params) == count


def plan(name: str, *variant: str):
    """Times, and the kinds that are on at each step's start."""
    exp = experiment(name, *variant)
    s = exp.config.sample
    p = exp.pipeline.generator(decode=lambda x: x).plan()
    on = [segment.on for segment in p.segments for _ in range(segment.start, segment.stop)]
    return np.array(p.grid), on, p, s


# Config -> FID, labels, CFG and IG of the row that it says it reproduces (arXiv 2512.24176; DiT:
# 2212.09748; SRA 2: 2601.17830; SRA: 2505.02831; token groups: 2607.02508; DDAE++: its README).
ROWS = {
    ("dit_xl",): (2.27, "random", 1.5, 1.0),
    ("sit_b",): (16.19, "random", 1.0, 2.3),
    ("sit_xl",): (1.46, "random", 1.35, 1.4),
    ("sit_b_sra2",): (28.89, "random", 1.0, 1.0),
    ("sit_b_dispersive",): (32.35, "random", 1.0, 1.0),
    ("sit_sra_b",): (29.1, "random", 1.0, 1.0),
    ("sit_sra_l",): (14.3, "random", 1.0, 1.0),
    ("sit_sra_xl",): (1.58, "random", 1.8, 1.0),
    ("sit_sra_xl_512",): (2.07, "random", 2.5, 1.0),
    ("dit_sra_b",): (39.8, "random", 1.0, 1.0),
    ("dit_sra_l",): (19.9, "random", 1.0, 1.0),
    ("dit_sra_xl",): (16.5, "random", 1.0, 1.0),
    ("sit_dts_b",): (29.89, "random", 1.0, 1.0),
    ("sit_dts_xl",): (1.44, "random", 1.8, 1.0),
    ("sit_self_flow_xl",): (1.47, "random", 1.8, 1.0),
    ("lightningdit_ddae_b",): (14.52, "random", 1.0, 1.0),
    ("lightningdit_ddae_b", "baseline"): (15.51, "random", 1.0, 1.0),
    ("lightningdit_ddae_b", "unconditional"): (20.85, "1000", 1.0, 1.0),
    ("lightningdit_xl",): (1.19, "random", 1.45, 1.4),
    ("lightningdit_xl", "no_cfg"): (1.34, "random", 1.0, 1.7),
}


@pytest.mark.parametrize(
    "run", [r for r in RUNS if r[0] not in ("digits", "tree", "images", "emoji")], ids=":".join
)
def test_a_config_is_set_to_the_row_that_it_names_or_says_that_there_is_none(run):
    text = importlib.import_module(f"configs.{run[0]}").__doc__
    s = experiment(*run).config.sample
    if run not in ROWS:
        assert "Reproduces: no published row" in text and "labels" in text and "CFG" in text
        return
    fid, labels, cfg, ig = ROWS[run]
    assert (s.labels, s.cfg.scale, s.ig.scale) == (labels, cfg, ig)
    words = " ".join(text.split())
    for told in (f"FID {fid}", labels, f"IG {ig}", f"CFG {cfg}" if cfg != 1 else "CFG"):
        assert told in words


def test_sit_xl_is_sampled_as_published():
    grid, on, _, s = plan("sit_xl")
    np.testing.assert_allclose(grid, [*np.linspace(1, 0.04, 250), 0], rtol=1e-12)
    assert [k for k in on] == [{"ig", "cfg"} if t <= 0.7 else {"ig"} for t in grid[:-1]]
    assert (s.ig.scale, s.cfg.scale) == (1.4, 1.35)


def test_dit_xl_is_sampled_as_published():
    grid, on, p, s = plan("dit_xl")
    # 250 of a thousand steps: evenly from the first to the last, rounded.
    kept = np.round(np.arange(250) * 999 / 249)
    np.testing.assert_allclose(grid, [*(kept[::-1] + 1) / 1000, 0], atol=1e-12)
    assert set(map(frozenset, on)) == {frozenset({"cfg"})}
    assert (s.cfg.scale, s.cfg.channels, s.sampler.clip_denoised) == (1.5, 3, False)
    assert guidance.evaluations(p.segments, s.sampler.calls()).network == 500


def test_dit_with_ig_is_sampled_without_cfg():
    assert set(plan("dit_l_ig")[1]) == {frozenset({"ig"})}
    grid, on, _, s = plan("dit_b_ig")
    assert on == [{"ig"} if t >= 0.13 else set() for t in grid[:-1]] and s.ig.scale == 2.3


def test_sit_b_is_sampled_as_in_the_ablation():
    grid, on, _, s = plan("sit_b")
    assert on == [{"ig"} if t >= 0.3 else set() for t in grid[:-1]] and s.ig.scale == 2.3


def test_lightningdit_xl_is_sampled_as_published():
    grid, on, p, s = plan("lightningdit_xl")
    # In their time: 125 points from noise to data, shifted by 0.3; CFG discarded below 0.19.
    t = np.linspace(0, 1, 125)
    theirs = 0.3 * t / (1 + (0.3 - 1) * t)
    np.testing.assert_allclose(1 - grid, theirs, atol=1e-12)
    assert on == [{"ig"} if t < 0.19 else {"ig", "cfg"} for t in theirs[:-1]]
    assert (s.ig.scale, s.cfg.scale) == (1.4, 1.45)
    # 248 calls there, each of both halves; here only the conditional one before CFG sets in.
    cost = guidance.evaluations(p.segments, s.sampler.calls())
    assert cost.network == 248 + sum(t >= 0.19 for t in [*theirs[:-1], *theirs[1:]])


def test_lightningdit_xl_without_cfg_is_sampled_as_published():
    _, on, p, s = plan("lightningdit_xl", "no_cfg")
    assert set(on) == {frozenset({"ig"})} and s.ig.scale == 1.7
    assert guidance.evaluations(p.segments, s.sampler.calls()).network == 248
