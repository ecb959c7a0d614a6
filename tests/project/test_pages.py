"""Every command of docs/ works, in the order of the pages, on a made-up ImageNet of toy size."""

import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import commands
import dinov2_weights
import inception_weights
import lively
import narrow
import numpy as np
import pytest
from adm import adm_blocks
from PIL import Image
from published_optimizers import adamw_state, drawn, published_order, squares, tensors
from torch_pickles import write

from ig_jax import modes
from ig_jax.data.tfds import format as tfds_format
from ig_jax.interop import parameter_names
from ig_jax.io.torch import writer as torch_writer
from ig_jax.metrics import reference_statistics
from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.sit import SiT, SiTSettings

DOCS = commands.ROOT / "docs"
SIDE, CLASSES = 32, 2
MEASURED = {
    *("fid", "sfid", "precision", "recall"),
    *("inception_score", "inception_score_torch_fidelity"),
}
MODEL = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "qk_norm": True,  # tells an importer how many heads there are
    "readouts": (1,),
    "dtype": "float32",
}
SMALL = {
    **{f"model.{name}": value for name, value in MODEL.items()},
    **{"train.epochs": 0, "train.steps": 50, "train.batch_size": 8},
    **{"checkpoint.every_steps": 50, "checkpoint.keep_every_steps": 0},
    **{"log.every_steps": 50, "log.samples_every_steps": 0},
    **{"data.source.num_classes": CLASSES, "prepare.batch_size": 8},
}
ALIGNED = {"depth": 1, "teacher_depth": 2}
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # as published
SAMPLES = {"sample.num": 2, "sample.batch_size": 2, "sample.sampler.num_steps": 2}
JUDGED = {"evaluate.num": 10, "sample.batch_size": 10, "sample.sampler.num_steps": 2}
CHANGES = {
    "--mode=sample": SAMPLES,
    "--mode=evaluate": JUDGED,
    "--mode=reference": {"sample.batch_size": 10},
    "--mode=probe": {
        **{"probe.times": "(0.3,0.1)", "probe.epochs": 1, "probe.batch_size": 4},
        "probe.neighbours": 3,
    },
}


def shown(page: str) -> list[list[str]]:
    """The words after `python main.py` of every command on a page."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    lines = [shlex.split(x, comments=True) for b in blocks for x in b.strip().split("\n")]
    return [words[2:] for words in lines if words[:2] == ["python", "main.py"]]


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    for page in sorted(DOCS.glob("*.md"))
    for words in shown(page.name)
    if not any(word.startswith("--config=runs/") for word in words)  # what an import writes
    if not words[0].startswith("--workdir=")  # whose config is that of a run, run below
]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("words", COMMANDS)
def test_flags_and_fields_of_a_command_exist(words, monkeypatch, capsys):
    """What they do is shown below, at length."""
    started = []
    for program in ("run", "import_file", "export_run"):
        monkeypatch.setattr(modes, program, lambda *given, **named: started.append(given))
    assert commands.run_here(words, monkeypatch) == 0, capsys.readouterr().err
    assert len(started) == 1


def at_toy_size(words: list[str]) -> list[str]:
    """The command with small networks and few samples."""
    changes = next((dict(CHANGES[word]) for word in words if word in CHANGES), {})
    ours = next((word for word in words if word.startswith("--config=configs/")), "")
    if ours:
        changes = SMALL | changes
        if "digits" in ours:
            del changes["data.source.num_classes"]
        if re.search(r"/[a-z]+_(sra|dts)_", ours):
            path = "objective.terms.self_alignment"
            changes |= {f"{path}.{name}": value for name, value in ALIGNED.items()}
        if "unconditional" in ours:
            changes["sample.labels"] = str(CLASSES)
        if "image" in ours.partition(":")[2]:
            changes["data.source.size"] = SIDE
        if "no_data" in ours:
            changes["data.source.side"] = SIDE // (8 if "sit" in ours else 16)
            changes["sample.seed"] = 1  # of the same samples nothing would be left to do
    placed = [
        word.replace("=configs/", f"={commands.ROOT}/configs/")
        .replace("_depth=8", "_depth=1")
        .replace("readout=12", "readout=1")
        for word in words
        if not word.startswith("--config.model.readouts=")  # repeated, it would be added to
    ]
    return placed + [f"--config.{name}={value}" for name, value in changes.items()]


def plant_data(root: Path) -> None:
    """Images in two classes, and the weights of narrow autoencoders."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (34 + i, 40, 3), np.uint8) for i in range(8)]
    for split, some in (("train", pictures), ("val", pictures[:3])):
        for i, picture in enumerate(some):
            file = root / "data" / "imagenet" / split / f"n{i % CLASSES}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
    plant_tfds(root / "data" / "tfds" / "imagenet2012" / "5.1.0")
    (root / "photos").mkdir()
    for i, picture in enumerate(pictures[:2]):
        Image.fromarray(picture).save(root / "photos" / f"{i}.png")
    (root / "weights").mkdir()
    narrow.save(root / "weights" / "sd-vae-ft-ema.safetensors", "sdvae_diffusers")
    torch_writer.save(root / "weights" / "vavae.pt", narrow.state("vavae_f16d32"))
    statistics = {"mean": np.zeros((1, 32, 1, 1)), "std": np.ones((1, 32, 1, 1))}
    torch_writer.save(root / "weights" / "latents_stats.pt", statistics)
    plant_inception(root, rng)
    plant_dinov2(root)


def plant_inception(root: Path, rng: np.random.Generator) -> None:
    """A made-up Inception, statistics as ADM publishes them, and samples of somebody else."""
    state = inception_weights.state()
    torch_writer.save(root / "weights" / "pt_inception-2015-12-05-6726825d.pth", state)
    pictures = rng.integers(0, 255, (12, SIDE, SIDE, 3), np.uint8)
    adm = {"arr_0": pictures, "mu": np.zeros(2048, np.float32), "sigma": np.eye(2048)}
    adm |= {"mu_s": np.zeros(2023, np.float32), "sigma_s": np.eye(2023)}
    np.savez(root / "weights" / "VIRTUAL_imagenet256_labeled.npz", **adm)
    np.savez(root / "samples.npz", pictures)


def plant_dinov2(root: Path) -> None:
    """A made-up DINOv2, and statistics of its features."""
    torch_writer.save(root / "weights" / "dinov2_vitl14_pretrain.pth", dinov2_weights.state())
    folder, width = root / "data" / "reference", dinov2_weights.WIDTH
    folder.mkdir(parents=True)
    np.savez(folder / "reference-fd_dinov2.npz", mu=np.zeros(width), sigma=np.eye(width))


def plant_tfds(folder: Path) -> None:
    """Nine JPEGs as TFDS keeps those of imagenet2012, in two shards."""
    from tensorflow_datasets import features

    folder.mkdir(parents=True)
    kinds = {"image": features.Image(encoding_format="jpeg"), "file_name": features.Text()}
    kinds = features.FeaturesDict({**kinds, "label": features.ClassLabel(num_classes=CLASSES)})
    rng = np.random.default_rng(1)
    for shard in range(2):
        rows = []
        for i in range(4 + shard):
            content = io.BytesIO()
            pixels = rng.integers(0, 255, (40, 36 + i, 3), np.uint8)
            Image.fromarray(pixels).save(content, "JPEG")
            content.seek(0)
            rows.append({"image": content, "label": i % CLASSES, "file_name": f"{shard}{i}.JPEG"})
        file = folder / tfds_format.shard_name("imagenet2012", "train", shard, 2)
        tfds_format.write_shard(file, rows, kinds)
    about = {"name": "imagenet2012", "split": "train", "description": "noise"}
    counts = {"shard_lengths": [4, 5], "num_bytes": 0}
    tfds_format.write_metadata(folder, features=kinds, **about, **counts)


def plant_networks(root: Path) -> None:
    rest = {"mlp_ratio": 4.0, "time_scale": 1.0, "remat": "none", "unroll": 1}
    sit = SiTSettings(**MODEL, **rest, patch_size=2)
    plain = dataclasses.replace(sit, readouts=())
    options = {"swiglu": True, "rope": True, "rms_norm": True, "shift": True}
    lightningdit = LightningDiTSettings(**MODEL | {"readouts": ()}, **rest, **options, patch_size=1)
    files = {
        "SiT-XL-2-256x256.pt": Network(DiT, plain, 4, 4, CLASSES),  # the same names and shapes
        "DiT-XL-2-256x256.pt": Network(DiT, plain, 4, 4, CLASSES),
        "lightningdit-xl-imagenet256-800ep.pt": Network(LightningDiT, lightningdit, 2, 32, CLASSES),
    }
    for name, net in files.items():
        state = parameter_names.to_published(lively.parameters(net))
        if net.family is LightningDiT:
            state |= parameter_names.rotary_tables(2, 8)
        torch_writer.save(root / "weights" / name, state)
    state = parameter_names.to_published(lively.parameters(Network(SiT, sit, 4, 4, CLASSES)))
    raw = published_order(state, "ig_sit_b2")
    first = drawn(raw, 1, 1e-3)
    opt = adamw_state(raw, first, squares(first), ADAMW)
    content = {"model": tensors(raw), "ema": tensors(raw), "opt": opt, "steps": 5}
    write(root / "weights" / "ig_sit_xl.pt", content)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    plant_data(root)
    plant_networks(root)
    return root


def run_page(page: str, place: Path) -> list[str]:
    """What the commands of a page say."""
    toy = [at_toy_size(words) for words in shown(page)]
    said = []
    for words, (status, out, err) in zip(toy, commands.run(toy, place), strict=False):
        assert status == 0, f"{' '.join(words)}\n{err}"
        said.append(out)
    assert len(said) == len(toy)
    return said


def side(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


@pytest.fixture(scope="module")
def imagenet(place):
    return run_page("imagenet.md", place)


@pytest.mark.slow
def test_the_way_from_pictures_to_samples_works(imagenet, place):
    assert sum("examples are in data/latents" in said for said in imagenet) == 5
    archives = sorted((place / "runs").glob("*/samples/*/samples.npz"))
    assert len(archives) == 4
    for file in archives:
        with np.load(file) as samples:
            assert samples["arr_0"].shape == (2, SIDE, SIDE, 3)
            assert samples["arr_0"].dtype == np.uint8 and np.ptp(samples["arr_0"]) > 0
            adm = np.concatenate(list(adm_blocks(file, 1)))
            np.testing.assert_array_equal(adm, samples["arr_0"])
        assert side(file.with_name("000001.png")) == (SIDE, SIDE)
    assert len(list((place / "data" / "latents-npy" / "vae-sd").rglob("*.npy"))) == 8
    assert (place / "data" / "latents-shards" / "latents_rank00_shard000.safetensors").exists()


@pytest.mark.slow
def test_samples_are_judged_as_the_page_says(imagenet, place):
    """The numbers mean nothing: network, Inception and real images are made up."""
    told = [said for said in imagenet if "FID" in said]
    assert len(told) == 3
    of_both, drawn, given = (
        json.loads(file.read_text())
        for run in ("sit_xl", "evaluated")
        for file in sorted(
            (place / "runs" / run).glob("evaluations/*/results.json"),
            key=lambda file: "second_features" not in file.read_text(),
        )
    )
    assert set(drawn["measures"]) == set(given["measures"]) == MEASURED
    assert set(of_both["measures"]) == MEASURED | {"fd_dinov2"}
    assert of_both["measures"].items() >= drawn["measures"].items()
    assert all(np.isfinite(stats["mean"]) for stats in drawn["measures"].values())
    assert "10 samples with random labels of step 50 (ema); EulerMaruyama 2, ig 1.4" in told[0]
    assert "12 samples of samples.npz" in told[2]
    assert drawn["rounding"] == "255 (x + 1) / 2, cut" and drawn["an_image"]["evaluations"] == 3
    assert drawn["reference"]["pictures_of_precision_and_recall"] == 12
    assert drawn["features"] == given["features"]
    made = reference_statistics.read(place / "data" / "reference" / "reference.npz", "")
    assert made.space == drawn["features"]["weights_sha256"]
    assert made.pool.mean.shape == (2048,) and made.spatial.covariance.shape == (2023, 2023)
    assert made.rows.shape == (8, 2048)


@pytest.fixture(scope="module")
def checkpoints(imagenet, place):
    return run_page("checkpoints.md", place)


@pytest.mark.slow
def test_the_ways_of_published_checkpoints_work(checkpoints, place):
    assert sum("sample it:" in text for text in checkpoints) == 6
    pictures = list((place / "runs").glob("*_official/samples/*/000000.png"))
    assert [side(picture) for picture in pictures] == [(SIDE, SIDE)] * 2
    assert list((place / "runs" / "sit_readouts" / "samples").glob("*-ig1.4-*/000000.png"))
    [tokens] = (place / "runs" / "ig_sit_xl").glob("visualizations/*/pca.npz")
    with np.load(tokens) as arrays:
        assert arrays["images"].shape == (2, SIDE, SIDE, 3)
        assert arrays["rgb"].shape == (2, 4, MODEL["depth"], 2, 2, 3)
    card = (place / "ig_sit_xl.md").read_text()
    assert "# SiT + Internal Guidance" in card and "imported from a published checkpoint" in card


@pytest.mark.slow
def test_the_ways_of_self_alignment_work(imagenet, place):
    said = run_page("alignment.md", place)
    assert sum("trained: step 50 of 50" in text for text in said) == 3
    for run in ("sit_sra_b", "sit_dts_b", "dit_sra_b"):
        lines = (place / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert np.isfinite(json.loads(lines[-1])["loss/self_alignment"])


@pytest.mark.slow
def test_the_ways_of_self_conditioning_work(imagenet, place):
    said = run_page("self_conditioning.md", place)
    assert sum("trained: step 50 of 50" in text for text in said) == 2
    card = (place / "lightningdit_ddae_b.md").read_text()
    assert "self-conditioning from block 1 on (a reading of DDAE++" in card


@pytest.mark.slow
def test_averages_of_any_length_are_composed_and_judged(place):
    said = run_page("averages.md", place)
    assert "sigma_rel_0.15 at step 50, of 4 averages at 2 steps" in said[1]
    assert "10 samples" in said[2] and "(sigma_rel_0.15)" in said[2]


@pytest.mark.slow
def test_every_family_is_probed(checkpoints, place):
    said = run_page("probing.md", place)
    assert sum("Best cell: block" in text for text in said) == 4
    for run in ("ig_sit_xl", "sit_official", "dit_official", "lightningdit_official"):
        [file] = (place / "runs" / run).glob("probes/*/results.json")
        record = json.loads(file.read_text())
        assert np.shape(record["validation_accuracy"]) == (2, MODEL["depth"])
        assert (record["trained_on"], record["test"]["images"]) == (6, 3)


@pytest.mark.slow
def test_a_command_that_fails_is_told(tmp_path):
    [(status, _, err)] = commands.run([["--config=nowhere.py"], ["--help"]], tmp_path)
    assert status == 2 and "no such config file" in err
