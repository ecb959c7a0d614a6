"""--mode=visualize: it writes what the network's tokens give, and a mistake is one sentence."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image
from tiers import slow_but

import ig_jax
from ig_jax import modes
from ig_jax.data.crop import center_crop
from ig_jax.data.sources.digits import Digits
from ig_jax.errors import UserError
from ig_jax.programs import visualize as visualize_mode

FEW = {"visualize.num": 3, "visualize.times": (0.6, 0.1), "sample.weights": "0.8"}


def visualize(workdir, **changes):
    """The folder, settings and arrays that the mode leaves."""
    named = {f"visualize.{name}": value for name, value in changes.items()}
    folder = modes.run(tiny.settings(FEW | named), workdir=workdir, mode="visualize")
    with np.load(folder / "pca.npz") as arrays:
        return folder, json.loads((folder / "settings.json").read_text()), dict(arrays)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny.trained().copy(tmp_path_factory.mktemp("run"))


@pytest.fixture
def photos(tmp_path):
    """A folder with images of several shapes and other files, and one folder deeper."""
    rng = np.random.default_rng(0)
    for name, shape in {"a.png": (9, 20, 3), "b.png": (30, 16), "more/c.png": (8, 8, 3)}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("basis", slow_but(["cell"], ["cell", "shared"]))
def test_held_out_digits_are_drawn_as_the_python_api_gives_them(workdir, basis):
    folder, record, arrays = visualize(workdir, basis=basis, seed=7, labels="3,5", norm="min_max")
    images = Digits("held_out").batch(np.array([0, 118, 236]))["stored"]
    np.testing.assert_array_equal(arrays["images"], images)
    pipe = ig_jax.load(workdir, weights="0.8")
    found = [pipe.features(images, t, (1, 2), [3, 5, 3], seed=7) for t in (0.6, 0.1)]
    tokens = np.stack([np.stack([at[1], at[2]], axis=1) for at in found], axis=1)
    pca = ig_jax.token_pca(tokens, norm="min_max", basis=basis)
    assert arrays["rgb"].shape == (3, 2, 2, 4, 4, 3)
    for name, expected in vars(pca).items():
        np.testing.assert_allclose(arrays[name], expected, rtol=0, atol=1e-5, err_msg=name)
    assert arrays["blocks"].tolist() == [1, 2]
    np.testing.assert_allclose(arrays["times"], [0.6, 0.1])
    assert [i["name"] for i in record["images"]] == [f"held out, {n}" for n in (0, 118, 236)]
    assert record["checkpoint_step"] == 24 and record["weights"] == "0.8"
    assert folder.name.startswith(f"step24-0.8-{basis}-seed7-")
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (80 + 3 * 98, 22 + 6 * 98)
        last = np.asarray(grid)[22 + 5 * 98 :, 80 + 2 * 98 :][12:96:24, 12:96:24]
    np.testing.assert_array_equal(last, np.round(255 * arrays["rgb"][2, 1, 1]))


@pytest.mark.slow
def test_the_same_settings_give_the_same_bytes_and_others_another_folder(workdir):
    def contents(folder):
        return {f.name: f.read_bytes() for f in folder.iterdir() if f.name[0] != "."}

    first, _, arrays = visualize(workdir)
    before = contents(first)
    again, _, _ = visualize(workdir)
    assert again == first and contents(again) == before
    assert before.keys() == {"grid.png", "pca.npz", "settings.json"}
    other, _, changed = visualize(workdir, seed=1)
    assert other != first and not np.allclose(changed["rgb"], arrays["rgb"])
    labelled, _, changed = visualize(workdir, labels="3")
    assert labelled != first and not np.allclose(changed["rgb"], arrays["rgb"])


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_images_of_a_folder_are_brought_to_the_size_of_training(workdir, photos, resize):
    _, record, arrays = visualize(workdir, images=str(photos), resize=resize, blocks=(2,))
    names = [str(photos / name) for name in ("a.png", "b.png", "more/c.png")]
    assert [image["name"] for image in record["images"]] == names
    with Image.open(photos / "a.png") as image:
        small = (
            image.resize((8, 8), Image.Resampling.BILINEAR)
            if resize == "squash"
            else Image.fromarray(center_crop(image, 8))
        )
    np.testing.assert_array_equal(arrays["images"][0, ..., 0], np.asarray(small.convert("L")))
    assert arrays["rgb"].shape == (3, 2, 1, 4, 4, 3)


def test_one_image_file_is_one_row_of_images(workdir, photos):
    _, record, arrays = visualize(workdir, images=str(photos / "b.png"))
    assert len(record["images"]) == len(arrays["images"]) == 1


def test_blocks_are_spread_over_a_deep_network():
    assert visualize_mode._spread(2) == (1, 2)
    assert visualize_mode._spread(7) == tuple(range(1, 8))
    assert visualize_mode._spread(28) == (1, 6, 10, 14, 19, 24, 28)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"visualize.images": "nowhere"}, "visualize.images = 'nowhere': no such file; name an im"),
        ({"visualize.images": "empty"}, "visualize.images = 'empty': holds no image; name another"),
        ({"visualize.images": "text.png"}, "text.png: cannot be decoded"),
        ({"visualize.blocks": (3,)}, r"visualize.blocks = \(3,\): must lie in 1..2, the model's"),
        ({"visualize.blocks": (0,)}, r"visualize.blocks = \(0,\): must be numbers of blocks"),
        ({"visualize.blocks": (1, 1)}, r"visualize.blocks = \(1, 1\): must be .* each once"),
        ({"visualize.times": (1.5,)}, r"visualize.times = \(1.5,\): needs 1 to 16 times in"),
        ({"visualize.times": ()}, r"visualize.times = \(\): needs 1 to 16 times"),
        ({"visualize.labels": "11"}, "visualize.labels = '11': must lie in 0..9, or be 10"),
        ({"visualize.labels": "random"}, "visualize.labels = 'random': must be class numbers"),
        ({"visualize.num": 0}, "visualize.num = 0: must be at least 1"),
        ({"visualize.resize": "fit"}, "visualize.resize = 'fit': must be squash or crop"),
        ({"visualize.norm": "none"}, "visualize.norm = 'none': must be layer_norm or min_max"),
        ({"visualize.basis": "all"}, "visualize.basis = 'all': must be cell or shared"),
        (
            {"objective.label_drop": 0.0, "sample.cfg.scale": 1.0},
            "visualize.labels = None: this network was trained without a null class; name class",
        ),
        ({"data.codec.name": "as_stored"}, "data.codec.name = 'as_stored': makes no latents of 8"),
        ({}, "holds no checkpoint"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence):
        modes.run(tiny.settings(changes), workdir=tmp_path / "run", mode="visualize")
    assert sorted(tmp_path.rglob("*")) == before


def test_latents_are_no_images(tmp_path):
    latents = {"name": "synthetic", "side": 4, "channels": 8, "num_classes": 3, "size": 4}
    changes = {"data.source": latents, "data.codec": {"name": "sd_vae", "weights": None}}
    with pytest.raises(UserError, match="visualize.images = None: data.source holds no images"):
        modes.run(tiny.settings(changes), workdir=tmp_path, mode="visualize")
