"""DINOv2 against the published implementation, and its resize against PyTorch's.

`golden/dinov2.npz` was computed with the package dinov2 0.0.1.dev2 (the code of
facebookresearch/dinov2) and torch 2.13.0 on a CPU from the weights of `dinov2_weights.py` and four
images of `inception_weights.py`. They were resized in float32 by
`interpolate(..., mode="bicubic", antialias=True)` and normalised as EDM2 does it (`rows_<side>`
holds the rows `row_numbers`); the network, cast to float64, made `pool` of them. Every sixteenth
row of its table of positions for 16 x 16 patches is `positions`. In float32 it is itself 8e-7 of
the largest feature away.
"""

import jax
import numpy as np
import pytest
from dinov2_weights import DEPTH, WIDTH, state
from inception_weights import picture
from safetensors.numpy import save_file
from vectors import golden_file

from ig_jax.errors import UserError
from ig_jax.io.torch import writer as torch_writer
from ig_jax.metrics import dinov2, dinov2_network
from ig_jax.metrics.dinov2 import Dinov2
from ig_jax.metrics.feature_space import FeatureSpace

pytestmark = pytest.mark.golden

SIDES = (32, 224, 256, 300)  # of the images: to enlarge, to leave, and two to shrink
TOLERANCE = 5e-6  # of the largest feature of an image; ours are at most 1.2e-6 away


def no_pictures():
    raise AssertionError("a published network was given training images")


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_file(golden_dir, "dinov2.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def published():
    return state()


@pytest.fixture(scope="module")
def weights(published):
    return dinov2.from_published(published)


@pytest.fixture(scope="module")
def network():
    return jax.jit(dinov2_network.class_token)


def error(ours, golden):
    return np.max(np.abs(np.asarray(ours) - golden)) / np.max(np.abs(golden))


@pytest.mark.parametrize(("place", "side"), list(enumerate(SIDES)))
def test_images_and_features_are_the_published_ones(weights, network, golden, place, side):
    x = dinov2.prepare(picture(side))
    rows = np.asarray(x)[0, golden["row_numbers"]]
    np.testing.assert_allclose(rows, golden[f"rows_{side}"], rtol=0, atol=2e-5)
    assert error(network(weights, x)[0], golden["pool"][place]) < TOLERANCE


def test_positions_are_interpolated_as_published(weights, golden):
    ours = weights["positions"]
    assert ours.shape == (257, WIDTH) and ours.dtype == np.float32
    np.testing.assert_allclose(ours[::16], golden["positions"], rtol=0, atol=1e-5)


def test_positions_without_the_offset_would_not_be_the_published_ones(
    published, golden, monkeypatch
):
    monkeypatch.setattr(dinov2_network, "_OFFSET", 0.0)
    other = dinov2.from_published(published)["positions"]
    assert np.abs(other[::16] - golden["positions"]).max() > 0.01


def test_a_table_of_the_images_own_side_is_left_alone():
    table = np.random.default_rng(0).normal(size=(49, 3)).astype(np.float32)
    np.testing.assert_array_equal(dinov2_network.interpolate_positions(table, 7), table)


def test_interpolated_positions_keep_a_constant_and_follow_a_line_inside():
    """Its cubics do not give lines exactly: they may be 0.2 of a position away."""
    y, x = np.mgrid[:37, :37].reshape(2, -1)
    table = np.stack([np.full(37 * 37, 3.0), y, x], axis=1).astype(np.float32)
    new = dinov2_network.interpolate_positions(table, 16).reshape(16, 16, 3)
    at = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    np.testing.assert_allclose(new[..., 0], 3, rtol=1e-6)
    for line in (new[1:-1, 3, 1], new[5, 1:-1, 2]):
        np.testing.assert_allclose(line, at[1:-1], rtol=0, atol=0.2)


def test_images_of_a_batch_do_not_mix_and_grey_is_shown_to_all_channels(weights, network):
    grey = picture(64)[..., :1]
    both = np.concatenate([np.broadcast_to(grey, (1, 64, 64, 3)), picture(64)])
    space = jax.jit(Dinov2(None))
    alone = space(weights, grey).pool
    batch = space(weights, both).pool
    assert error(batch[:1], np.asarray(alone)) < TOLERANCE
    assert error(batch[1:], np.asarray(alone)) > 0.01
    with pytest.raises(ValueError, match=r"images are \[1, 64, 64, 2\]: must have 1 or 3"):
        Dinov2(None)(weights, picture(64)[..., :2])


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_is_read_with_the_token_of_hidden_patches_or_without(
    published, weights, tmp_path, kind
):
    file = tmp_path / f"dinov2_vits14_pretrain.{kind}"
    if kind == "pth":
        torch_writer.save(file, published)
    else:
        save_file({n: a for n, a in published.items() if n != "mask_token"}, file)
    found = Dinov2(str(file)).load(no_pictures)
    jax.tree.map(np.testing.assert_array_equal, found, weights)
    assert len(found["blocks"]["attn"]["qkv"]["kernel"]) == DEPTH


@pytest.mark.parametrize("file", [None, "weights/absent.pth"])
def test_a_missing_file_is_told_with_where_to_find_it(file):
    with pytest.raises(UserError) as refusal:
        Dinov2(file).load(no_pictures)
    told = str(refusal.value)
    assert told.startswith(f"weights = {file!r}: no such file; FD_DINOv2 needs dinov2_vitl14_")
    assert told.endswith("set weights=weights/dinov2_vitl14_pretrain.pth")


GIANT = {"cls_token": np.zeros((1, 1, 1536), np.float32)}
REGISTERS = {"register_tokens": np.zeros((1, 4, WIDTH), np.float32)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (REGISTERS, "without registers; left over: register_tokens;"),
        (GIANT, r"of another shape: cls_token \(1, 1, 1536\) for \(1, 1, 1024\), pos_embed .*more"),
        ({"cls_token": None}, "missing: cls_token; of another shape"),
        ({"blocks.1.ls2.gamma": None}, "missing: blocks.1.ls2.gamma;"),
        (
            {"blocks.3.ls1.gamma": np.zeros(WIDTH, np.float32)},
            "missing: blocks.2.attn.qkv.weight, .*left over: blocks.3.ls1.gamma;",
        ),
    ],
)
def test_other_networks_are_refused_by_their_first_names(published, tmp_path, change, told):
    changed = {name: array for name, array in (published | change).items() if array is not None}
    save_file(changed, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"^weights = .*of DINOv2's ViT-S/14.*{told}"):
        Dinov2(str(tmp_path / "other.safetensors")).load(no_pictures)


def test_it_is_a_feature_space():
    space = Dinov2(None)
    assert isinstance(space, FeatureSpace)
    assert (space.frechet, space.gives, space.reads_labels) == ("fd_dinov2", ("pool",), False)
