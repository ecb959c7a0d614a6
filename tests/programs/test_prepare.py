"""Images become latents on disk, whole or not at all, and training refuses those of others.

The images are a made-up ImageNet: class folders of files of many sizes. The autoencoders are
random and narrow.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import narrow
import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors import safe_open
from tiers import slow_but

from configs import imagenet
from ig_jax import experiment, modes, prng
from ig_jax.codecs.autoencoders import SdVae, VaVae
from ig_jax.config import run_config
from ig_jax.data import provenance
from ig_jax.data.latent_writers import LAYOUTS
from ig_jax.data.sources.array_record import ArrayRecord
from ig_jax.data.sources.image_folder import ImageFolder
from ig_jax.data.sources.npy_folder import NpyFolder
from ig_jax.data.sources.safetensors_shards import SafetensorsShards
from ig_jax.errors import UserError
from ig_jax.io.torch import file as torch_file
from ig_jax.programs import prepare

SIDE, CLASSES, EACH = 32, 3, 80
KINDS = {"sd_vae": "sdvae_diffusers", "va_vae": "vavae_f16d32"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """CLASSES folders of EACH images, of a colour a class, 30 to 70 pixels a side."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in range(CLASSES):
        folder = root / f"n{label:08d}"
        folder.mkdir()
        for i in range(EACH):
            height, width = rng.integers(30, 70, 2)
            pixels = rng.integers(0, 120, (height, width, 3))
            pixels[..., label] += 130
            suffix = ("JPEG", "png")[i % 2]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"p{i:03d}.{suffix}")
    return root


@pytest.fixture(scope="module")
def few(pictures, tmp_path_factory):
    """24 of them, in two classes."""
    root = tmp_path_factory.mktemp("few")
    for label in range(2):
        (root / f"n{label}").mkdir()
        for i in range(12):
            name = f"p{i:03d}.{('JPEG', 'png')[i % 2]}"
            shutil.copy(pictures / f"n{label:08d}" / name, root / f"n{label}" / name)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Codec -> file of its autoencoder, whose draws are certain to 1e-4."""
    root = tmp_path_factory.mktemp("weights")
    return {
        codec: narrow.save(root / f"{codec}.safetensors", kind, certain=True)
        for codec, kind in KINDS.items()
    }


def settings(codec, source, path, weights="", **preparing):
    """A tiny run on `source`; for --mode=prepare and for training."""
    c = tiny.settings()
    c.data = getattr(imagenet, codec)(source, str(path), weights=weights)
    c.data.source.num_classes = CLASSES
    if "size" in c.data.source:
        c.data.source.size = SIDE
    if source == "image_folder":
        c.data.source.fewer_classes = True  # a few images are of two
    c.model.patch_size = 1
    c.train.update({"steps": 2, "batch_size": 8})
    c.checkpoint.every_steps = c.log.every_steps = 2
    c.prepare.update({"batch_size": 16, "examples_per_file": 50, **preparing})
    return c


def prepared(c, folder) -> Path:
    modes.run(c, workdir=str(folder), mode="prepare")
    return folder


@pytest.fixture(scope="module")
def moments(pictures, weights, tmp_path_factory):
    c = settings("sd_vae", "image_folder", pictures, weights["sd_vae"])
    return prepared(c, tmp_path_factory.mktemp("moments"))


@pytest.fixture(scope="module")
def twins(pictures, weights, tmp_path_factory):
    c = settings("va_vae", "image_folder", pictures, weights["va_vae"])
    return prepared(c, tmp_path_factory.mktemp("twins"))


def contents(folder) -> dict[str, str]:
    """Relative name -> hash, of every file."""
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.md5(file.read_bytes()).hexdigest()
        for file in sorted(files)
    }


def everything(source) -> dict[str, np.ndarray]:
    return source.batch(np.arange(len(source)))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["va_vae", "sd_vae"])
def test_a_run_encodes_pictures_itself_where_they_are_its_source(
    codec, pictures, twins, weights, tmp_path
):
    c = settings(codec, "image_folder", pictures, weights[codec])
    if codec == "va_vae":
        c.data.codec.statistics = str(twins / "latents_stats.pt")
    assert modes.run(c, workdir=str(tmp_path)).finished


# What is stored.


def test_moments_are_what_the_encoder_says_of_each_cropped_picture(moments, pictures, weights):
    source, stored = (
        ImageFolder(str(pictures), SIDE, CLASSES),
        ArrayRecord(str(moments), "train", CLASSES),
    )
    assert len(stored) == CLASSES * EACH and stored.stored_shape == (4, 4, 8)
    indices = np.array([0, 100, 239])
    mine, original = stored.batch(indices), source.batch(indices)
    codec = SdVae(weights["sd_vae"])
    encoder = narrow.encoder(codec, SIDE)
    expected = jax.jit(codec.to_store)(jnp.asarray(original["stored"]), encoder, jax.random.key(0))
    np.testing.assert_allclose(mine["stored"], expected, atol=2e-5)
    assert mine["stored"][..., 4:] == pytest.approx(np.exp(narrow.LOG_VARIANCE / 2), rel=1e-4)
    np.testing.assert_array_equal(mine["label"], original["label"])
    assert stored.name(100) == source.name(100)


@pytest.mark.slow
def test_a_twin_is_the_latent_of_the_mirrored_picture(twins, pictures, weights):
    source, stored = (
        ImageFolder(str(pictures), SIDE, CLASSES),
        ArrayRecord(str(twins), "train", CLASSES),
    )
    mine = stored.batch(np.array([7, 201]))["stored"]
    original = source.batch(np.array([7, 201]))["stored"]
    codec = VaVae(weights["va_vae"])
    encoder = narrow.encoder(codec, SIDE)
    keys = prng.keys(0, "other", jnp.arange(2))
    for half, pixels in ((mine[..., :32], original), (mine[..., 32:], original[:, :, ::-1])):
        expected = jax.jit(codec.to_store)(jnp.asarray(pixels), encoder, keys)[..., :32]
        np.testing.assert_allclose(half, expected, atol=1e-4)
    assert np.abs(mine[..., :32] - mine[..., 32:]).max() > 0.1


@pytest.mark.slow
def test_what_is_encoded_in_a_step_is_what_would_have_been_stored(pictures, twins, weights):
    original = ImageFolder(str(pictures), SIDE, CLASSES).batch(np.arange(16))["stored"]
    stored = ArrayRecord(str(twins), "train", CLASSES).batch(np.arange(16))["stored"]
    codec = VaVae(weights["va_vae"], statistics=str(twins / "latents_stats.pt"))
    key = jax.random.key(3)
    now = codec.latent(jnp.asarray(original), key, narrow.encoder(codec, SIDE))
    np.testing.assert_allclose(now, codec.latent(jnp.asarray(stored), key), atol=1e-3)


@pytest.mark.slow
def test_draws_depend_on_the_example_and_not_on_its_batch():
    """With a wide posterior; the batches of prepare may be of any size."""
    rng = np.random.default_rng(0)
    state = narrow.state("vavae_f16d32")
    codec = VaVae("")
    encoder = jax.tree.map(jnp.asarray, codec.from_published(state))
    pixels = jnp.asarray(rng.integers(0, 255, (3, SIDE, SIDE, 3), np.uint8))
    keys = prng.keys(0, "prepare", jnp.arange(3))
    together = jax.jit(codec.to_store)(pixels, encoder, keys)
    alone = jax.jit(codec.to_store)(pixels[1:2], encoder, keys[1:2])
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-4, atol=1e-4)
    other = jax.jit(codec.to_store)(pixels[1:2], encoder, keys[:1])
    assert np.abs(np.asarray(other - alone)).max() > 0.1


@pytest.mark.slow
def test_statistics_are_those_of_all_latents_and_of_no_twin(twins):
    stored = everything(ArrayRecord(str(twins), "train", CLASSES))["stored"].astype(np.float64)
    latents = stored[..., :32].reshape(-1, 32)
    found, noted = torch_file.load(twins / "latents_stats.pt"), provenance.read(twins)
    for name, exact in (("mean", latents.mean(0)), ("std", latents.std(0, ddof=1))):
        np.testing.assert_allclose(getattr(noted, name), exact, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found[name], exact.reshape(1, 32, 1, 1), rtol=1e-6, atol=1e-7)


def test_statistics_of_moments_count_the_variance_of_the_draws():
    rng = np.random.default_rng(0)
    stored = np.concatenate([np.full((500, 2, 2, 4), 3.0), np.full((500, 2, 2, 4), 2.0)], -1)
    first, second = SdVae("").sums(stored)
    np.testing.assert_allclose(first / 2000, 3.0)
    np.testing.assert_allclose(second / 2000 - 9.0, 4.0)
    draws = 3 + 2 * rng.standard_normal(100_000)
    assert np.mean(draws**2) == pytest.approx(second[0] / 2000, rel=0.02)


def test_the_record_tells_what_made_the_latents(moments, weights):
    noted = provenance.read(moments)
    assert (noted.codec, noted.image_size, noted.crop) == ("sd_vae", SIDE, "center-crop-dhariwal")
    assert noted.input_range == (-1.0, 1.0) and noted.examples == CLASSES * EACH
    assert noted.autoencoder == hashlib.sha256(Path(weights["sd_vae"]).read_bytes()).hexdigest()
    assert not noted.skipped and noted.source["name"] == "image_folder"


# One layout and another.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "layout", "source"),
    [("sd_vae", "npy_folder", NpyFolder), ("va_vae", "safetensors_shards", SafetensorsShards)],
)
def test_a_published_layout_holds_the_same_and_converts_back_to_the_same_bytes(
    codec, layout, source, moments, twins, tmp_path
):
    original = {"sd_vae": moments, "va_vae": twins}[codec]
    c = settings(codec, "array_record", original, layout=layout)
    published = prepared(c, tmp_path / "published")
    mine, theirs = (
        everything(ArrayRecord(str(original), "train", CLASSES)),
        everything(source(str(published), CLASSES)),
    )
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name])
    assert source(str(published), CLASSES).record().image_size == SIDE

    c = settings(codec, layout, published)
    again = prepared(c, tmp_path / "again")
    back = everything(ArrayRecord(str(again), "train", CLASSES))
    np.testing.assert_array_equal(back["stored"], mine["stored"])
    if codec == "va_vae":
        assert (again / "latents_stats.pt").read_bytes() == (
            original / "latents_stats.pt"
        ).read_bytes()


@pytest.mark.slow
def test_others_open_what_is_written(moments, twins, tmp_path):
    """TFDS and the safetensors library; LightningDiT's loader uses the latter."""
    import tensorflow_datasets as tfds

    example = tfds.builder_from_directory(moments).as_data_source("train")[7]
    mine = ArrayRecord(str(moments), "train", CLASSES)
    stored = mine.batch(np.array([7]))["stored"][0]
    np.testing.assert_array_equal(example["moments"].transpose(1, 2, 0), stored)
    assert example["file_name"].decode() == mine.name(7) and example["label"] == 0

    c = settings("va_vae", "array_record", twins, layout="safetensors_shards")
    file = prepared(c, tmp_path / "shards") / "latents_rank00_shard001.safetensors"
    with safe_open(file, "numpy") as shard:
        assert shard.metadata() == {"total_size": "50", "dtype": "torch.float32", "device": "cpu"}
        assert shard.get_slice("labels").get_shape() == [50]
        latents = shard.get_tensor("latents")
    stored = ArrayRecord(str(twins), "train", CLASSES).batch(np.arange(50, 100))["stored"]
    np.testing.assert_array_equal(latents.transpose(0, 2, 3, 1), stored[..., :32])


@pytest.mark.parametrize(
    ("codec", "layout"), [("va_vae", "npy_folder"), ("sd_vae", "safetensors_shards")]
)
def test_a_layout_of_the_other_codec_is_refused(codec, layout, pictures, weights, tmp_path):
    c = settings(codec, "image_folder", pictures, weights[codec], layout=layout)
    with pytest.raises(
        UserError, match=f"prepare.layout = '{layout}': holds latents of .*array_record"
    ):
        prepared(c, tmp_path)


# Interrupted, and gone on.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "layout"),
    [
        ("sd_vae", "npy_folder"),
        ("sd_vae", "array_record"),
        ("va_vae", "safetensors_shards"),
    ],
)
def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    codec, layout, few, weights, tmp_path, monkeypatch
):
    small = {"batch_size": 4, "examples_per_file": 6}
    c = settings(codec, "image_folder", few, weights[codec], layout=layout, **small)
    whole = contents(prepared(c, tmp_path / "whole"))
    write, noted = LAYOUTS[layout].write, prepare._Preparation._write_note
    calls = []

    def stopped_in_writing(self, part):
        calls.append(part.number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, part)

    def stopped_before_the_note(self, part, skipped):
        if len(calls) == 5:
            raise KeyboardInterrupt
        noted(self, part, skipped)

    monkeypatch.setattr(LAYOUTS[layout], "write", stopped_in_writing)
    monkeypatch.setattr(prepare._Preparation, "_write_note", stopped_before_the_note)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepared(c, tmp_path / "broken")
        if len(calls) == 3:  # a note that a crash left empty: its part is made again
            (tmp_path / "broken" / "parts" / "00000.json").write_bytes(b"")
    assert contents(prepared(c, tmp_path / "broken")) == whole
    assert calls == [0, 1, 2, 0, 2, 2, 3]


NOTE = {
    "indices": [4, 5],
    "labels": [0, 1],
    "skipped": ["x.png: is cut off"],
    "values": 8,
    "first": [0.5, 1.0],
    "second": [1.5, 2.0],
}


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in NOTE for value in (None, {}, "x", [[]], [None])),
        *({"values": 0}, {"indices": []}, {"labels": [0]}, {"first": [0.5]}, {"labels": [0, 1.5]}),
    ],
    ids=str,
)
def test_a_note_that_is_not_what_was_written_does_not_count(change):
    assert prepare._is_note(NOTE, 2)
    assert not prepare._is_note(NOTE | change, 2)
    assert not any(prepare._is_note(found, 2) for found in (None, [], "x", {}))


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 9999])
def test_damaged_settings_begin_anew_only_where_nothing_else_is_there(
    content, few, weights, tmp_path
):
    c = settings("sd_vae", "image_folder", few, weights["sd_vae"])
    begun = prepare._Preparation(experiment.experiment(run_config.parse(c, 2)), tmp_path)
    begun.begin()
    whole = (tmp_path / "prepare.json").read_bytes()
    (tmp_path / "prepare.json").write_text(content)
    begun.begin()
    assert (tmp_path / "prepare.json").read_bytes() == whole
    (tmp_path / "prepare.json").write_text(content)
    (tmp_path / "latents.array_record").touch()
    with pytest.raises(UserError, match="prepare.json is damaged; name an empty folder"):
        begun.begin()


@pytest.mark.slow
def test_a_killed_preparation_goes_on_to_the_same_bytes(pictures, moments, weights, tmp_path):
    """In processes of their own; the file of the configuration is written for them."""
    c = settings("sd_vae", "image_folder", pictures, weights["sd_vae"])
    (tmp_path / "c.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n  return ConfigDict({c.to_dict()!r})"
    )
    folder = tmp_path / "latents"
    command = [sys.executable, "main.py", f"--config={tmp_path}/c.py", "--mode=prepare"]
    command.append(f"--workdir={folder}")
    for _ in range(5):  # on a busy machine it may be done before it is killed
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(command, cwd=tiny.ROOT)
        while not (folder / "parts" / "00001.json").exists() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not (folder / provenance.PROVENANCE_FILE).exists():
            break
    assert (folder / "parts").exists()
    subprocess.run(command, cwd=tiny.ROOT, check=True)
    assert contents(folder) == contents(moments)


def test_a_finished_preparation_is_left_as_it_is(moments, pictures, weights, capsys):
    before = contents(moments)
    c = settings("sd_vae", "image_folder", pictures, weights["sd_vae"])
    assert modes.run(c, workdir=str(moments), mode="prepare").examples == CLASSES * EACH
    assert "is prepared already" in capsys.readouterr().out and contents(moments) == before
    del c.data.source["fewer_classes"]  # configs of older runs lack it
    assert modes.run(c, workdir=str(moments), mode="prepare").examples == CLASSES * EACH


def test_other_settings_and_other_files_in_the_folder_are_refused(
    moments, pictures, weights, tmp_path
):
    c = settings("sd_vae", "image_folder", pictures, weights["sd_vae"])
    c.prepare.batch_size = 8
    with pytest.raises(
        UserError, match="begun with other settings.*prepare.batch_size: 16 there, 8"
    ):
        prepared(c, moments)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files; name an empty folder"):
        prepared(c, tmp_path)


# What cannot be read.


@pytest.fixture
def damaged(few, tmp_path):
    """The few, of which two cannot be read."""
    root = shutil.copytree(few, tmp_path / "damaged")
    (root / "n0" / "p002.JPEG").write_bytes(b"no image")
    whole = (root / "n1" / "p003.png").read_bytes()
    (root / "n1" / "p003.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_a_corrupt_picture_stops_the_preparation_and_is_named(damaged, weights, tmp_path):
    c = settings("sd_vae", "image_folder", damaged, weights["sd_vae"])
    with pytest.raises(UserError, match="n0/p002.JPEG.*bad_examples=skip"):
        prepared(c, tmp_path / "latents")
    c.prepare.bad_examples = "skip"
    assert provenance.read(prepared(c, tmp_path / "latents")).examples == 22


@pytest.mark.parametrize("layout", slow_but(["npy_folder"], ["array_record", "npy_folder"]))
def test_corrupt_pictures_are_left_out_and_listed_where_that_is_asked_for(
    damaged, weights, tmp_path, layout, capsys
):
    asked = {"layout": layout, "bad_examples": "skip", "batch_size": 4, "examples_per_file": 5}
    c = settings("sd_vae", "image_folder", damaged, weights["sd_vae"], **asked)
    made = modes.run(c, workdir=str(tmp_path / "latents"), mode="prepare")
    assert made.examples == 22 and len(made.skipped) == 2
    told = capsys.readouterr().out
    for name, reason in zip(("n0/p002.JPEG", "n1/p003.png"), made.skipped, strict=True):
        assert name in reason and name in told
    readers = {
        "array_record": lambda p: ArrayRecord(p, "train", 3),
        "npy_folder": lambda p: NpyFolder(p, 3),
    }
    found = everything(readers[layout](str(tmp_path / "latents")))
    np.testing.assert_array_equal(found["label"], [0] * 11 + [1] * 11)
    # Neighbours of those left out are the right ones.
    original = ImageFolder(str(damaged), SIDE, 2).batch(np.array([3, 14]))["stored"]
    codec = SdVae(weights["sd_vae"])
    encoder = narrow.encoder(codec, SIDE)
    expected = jax.jit(codec.to_store)(jnp.asarray(original), encoder, jax.random.key(0))
    np.testing.assert_allclose(found["stored"][[2, 13]], expected, atol=2e-5)


def test_a_codec_without_latents_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.codec.name = 'identity': makes no latents"):
        modes.run(tiny.settings(), workdir=str(tmp_path), mode="prepare")


def test_pictures_without_an_autoencoder_are_refused(pictures, tmp_path):
    c = settings("sd_vae", "image_folder", pictures)
    with pytest.raises(UserError, match="data.codec.weights = None: encoding images needs"):
        prepared(c, tmp_path)
    assert not list(tmp_path.iterdir())


# The record guards training.


def parsed(c):
    return run_config.parse(c, jax.device_count())


@pytest.mark.parametrize("codec", ["va_vae", "as_stored", "identity"])
def test_training_refuses_latents_of_another_codec(codec, moments):
    c = settings("sd_vae", "array_record", moments)
    parsed(c)
    fields = {"va_vae": {"weights": ""}}
    c.data.codec = {"name": codec, **fields.get(codec, {})}
    with pytest.raises(UserError, match=f"data.codec.name = '{codec}': .* made by 'sd_vae'"):
        parsed(c)


@pytest.mark.slow
def test_training_refuses_statistics_of_other_latents(twins, tmp_path):
    from ig_jax.io.torch import writer as torch_writer

    c = settings("va_vae", "array_record", twins)
    noted = provenance.read(twins)
    mean, std = np.array(noted.mean), np.array(noted.std)
    cases = {"near": (mean + 0.1 * std, std * 1.1), "scale": (0 * mean, 0 * mean + 1 / 0.18215)}
    cases["shift"] = (mean + np.eye(32)[5] * 0.3 * std, std)
    for name, (m, s) in cases.items():
        file = tmp_path / f"{name}.pt"
        torch_writer.save(file, {"mean": m.reshape(1, 32, 1, 1), "std": s.reshape(1, 32, 1, 1)})
        c.data.codec.statistics = str(file)
        if name == "near":
            parsed(c)
            continue
        with pytest.raises(UserError, match=f"{name}.pt': are not those of the latents"):
            parsed(c)


def test_training_refuses_another_input_range_and_a_broken_record(moments, tmp_path):
    folder = tmp_path / "latents"
    shutil.copytree(moments, folder)
    noted = json.loads((folder / provenance.PROVENANCE_FILE).read_text())
    (folder / provenance.PROVENANCE_FILE).write_text(
        json.dumps(noted | {"input_range": [0.0, 1.0]})
    )
    with pytest.raises(UserError, match=r"saw pixels in \[0.0, 1.0\], but 'sd_vae' means"):
        parsed(settings("sd_vae", "array_record", folder))
    (folder / provenance.PROVENANCE_FILE).write_text("{")
    with pytest.raises(UserError, match="ig_jax.json: is cut off or no record"):
        parsed(settings("sd_vae", "array_record", folder))


@pytest.mark.slow
def test_the_command_needs_a_folder():
    found = subprocess.run(
        [sys.executable, "main.py", "--config=tests/helpers/tiny.py", "--mode=prepare"],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and "--workdir is missing" in found.stderr


@pytest.mark.slow
def test_two_processes_prepare_the_files_of_one(pictures, weights, moments, tmp_path):
    c = settings("sd_vae", "image_folder", pictures, weights["sd_vae"])
    (tmp_path / "settings.py").write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({c.to_dict()!r})\n"
    )
    script = [sys.executable, "tests/helpers/two_processes.py", "prepared", str(tmp_path)]
    done = subprocess.run(script, cwd=tiny.ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "two") == contents(moments)
