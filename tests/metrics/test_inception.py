"""The Inception network of FID against torch-fidelity, and its resize against the rule itself.

`golden/inception.npz` was computed with torch-fidelity 0.4.0 and torch 2.13.0 on a CPU from the
weights and the three images of `inception_weights.py`: the images were resized by it in
float32 (`rows` holds those of `row_numbers`), and its network, cast to float64, made `pool`
('2048'), `logits` ('logits_unbiased') and `spatial` (the first 7 channels that leave Mixed_6d) of
them. In float32 it is itself 2e-7, 7e-7 and 2e-6 of the largest feature away from that.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inception_weights import KEYS, SIDES, picture, state
from safetensors.numpy import save_file
from vectors import golden_file

from ig_jax import pytree
from ig_jax.errors import UserError
from ig_jax.io.torch import writer as torch_writer
from ig_jax.metrics import inception, inception_network, inception_weights
from ig_jax.metrics.feature_space import FeatureSpace
from ig_jax.metrics.inception import Inception
from ig_jax.metrics.inception_network import TO_POOL, TO_SPATIAL

pytestmark = pytest.mark.golden

TOLERANCE = 1e-5  # of the largest feature of an image; ours are at most 4e-6 away


def no_pictures():
    raise AssertionError("a published network was given training images")


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_file(golden_dir, "inception.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def published():
    return state()


@pytest.fixture(scope="module")
def space(published, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(published, file)
    return Inception(str(file))


@pytest.fixture(scope="module")
def weights(space):
    return space.load(no_pictures)


@pytest.fixture(scope="module")
def network(weights):
    """Images in [-1, 1) -> features, compiled once for the tests."""
    compiled = jax.jit(inception_network.features)
    return lambda x: compiled(weights, x)


def errors(features, golden):
    """The largest difference of each image, as a share of its largest feature."""
    return {
        name: np.max(np.abs(np.asarray(ours) - golden[name]), 1) / np.max(np.abs(golden[name]), 1)
        for name, ours in features._asdict().items()
    }


# Features.


@pytest.fixture(scope="module")
def features(space, weights):
    """Of the golden images, each resized and passed through the network in one program."""
    each = [jax.jit(space)(weights, jnp.asarray(picture(side))) for side in SIDES]
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *each)


@pytest.mark.parametrize("name", ["pool", "logits", "spatial"])
def test_features_are_the_published_ones(features, golden, name):
    ours = getattr(features, name)
    assert ours.dtype == jnp.float32 and ours.shape == golden[name].shape
    assert (errors(features, golden)[name] < TOLERANCE).all()


@pytest.mark.slow
def test_half_a_pixel_is_far_outside_the_tolerance(network, golden):
    shape = (1, inception.SIDE, inception.SIDE, 3)
    shifted = [
        jax.image.resize(picture(side).astype(np.float32), shape, "linear", antialias=False)
        for side in SIDES
    ]
    off = errors(network((jnp.concatenate(shifted) - 128) / 128), golden)
    assert all((share > 100 * TOLERANCE).all() for share in off.values())


@pytest.mark.slow
def test_pictures_of_a_batch_do_not_mix(network, features):
    together = jnp.concatenate([inception.resize(jnp.asarray(picture(side))) for side in SIDES])
    alone = {name: np.asarray(rows) for name, rows in features._asdict().items()}
    off = errors(network((together - 128) / 128), alone)
    assert all((share < TOLERANCE).all() for share in off.values())


@pytest.mark.slow
def test_grey_pictures_are_seen_as_three_equal_channels(space, weights):
    grey = picture(64)[..., :1]
    one, three = (jax.jit(space)(weights, x) for x in (grey, grey.repeat(3, axis=-1)))
    off = errors(one, {name: np.asarray(rows) for name, rows in three._asdict().items()})
    assert all((share < TOLERANCE).all() for share in off.values())


def test_two_channels_are_refused(space, weights):
    with pytest.raises(ValueError, match=r"images are \[1, 8, 8, 2\]: must have 1 or 3 channels"):
        space(weights, jnp.zeros((1, 8, 8, 2), jnp.uint8))


# Resize.


def by_the_rule(image, y, x):
    """One output pixel, in the order and precision of the graph; image [h, w, c]."""
    f = np.float32
    corners, shares = [], []
    for i, n in ((y, image.shape[0]), (x, image.shape[1])):
        at = f(i) * f(n / 299)
        low = int(at)
        corners.append((low, min(low + 1, n - 1)))
        shares.append(f(at - f(low)))
    (top, bottom), (left, right) = corners

    def along(row):
        a, b = image[row, left].astype(f), image[row, right].astype(f)
        return a + (b - a) * shares[1]

    return along(top) + (along(bottom) - along(top)) * shares[0]


@pytest.mark.parametrize("height, width", [(64, 64), (256, 256), (299, 299), (512, 512), (48, 700)])
def test_resize_is_the_rule_to_the_last_bit(height, width):
    rng = np.random.default_rng(height)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = np.asarray(inception.resize(jnp.asarray(image)[None])[0])
    assert ours.shape == (299, 299, 3) and ours.dtype == np.float32
    places = [(0, 0), (0, 298), (298, 0), (298, 298), *rng.integers(0, 299, (300, 2)).tolist()]
    for y, x in places:
        np.testing.assert_array_equal(ours[y, x], by_the_rule(image, y, x), err_msg=f"{y}, {x}")


@pytest.mark.parametrize("side", SIDES)
def test_resize_is_that_of_torch_fidelity_to_the_last_bit(golden, side):
    ours = inception.resize(jnp.asarray(picture(side)))[0, golden["row_numbers"]]
    np.testing.assert_array_equal(ours, golden["rows"][SIDES.index(side)])


def test_compiled_resize_is_within_roundings_of_a_fused_product(golden):
    ours = jax.jit(inception.resize)(jnp.asarray(picture(512)))[0, golden["row_numbers"]]
    roundings = 4 * 255 * np.finfo(np.float32).eps
    np.testing.assert_allclose(ours, golden["rows"][-1], rtol=0, atol=roundings)


# The network.


def shape_after(chain, weights, x):
    return jax.eval_shape(lambda w, x: inception_network.apply_network(chain, w, x), weights, x)


def test_sides_and_channels_shrink_and_grow_as_published(weights):
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    met = [x := shape_after((step,), weights, x) for step in TO_SPATIAL + TO_POOL]
    assert [(x.shape[1], x.shape[3]) for x in met] == [
        *((149, 32), (147, 32), (147, 64), (73, 64), (73, 80), (71, 192), (35, 192)),
        *((35, 256), (35, 288), (35, 288)),
        *((17, 768), (17, 768), (17, 768), (17, 768), (17, 768)),
        *((8, 1280), (8, 2048), (8, 2048)),
    ]


def test_padding_does_not_count_in_an_average():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    pooled = np.asarray(inception_network.average_pool(x))[0, :, :, 0]
    rows = np.arange(12.0).reshape(3, 4)
    assert pooled[0, 0] == rows[:2, :2].mean() and pooled[2, 1] == rows[1:, :3].mean()
    assert pooled[1, 2] == rows[:, 1:].mean()


def test_every_product_runs_at_the_highest_precision(space, weights):
    program = jax.jit(space).lower(weights, picture(64)).as_text()
    kinds = [program.count(f"stablehlo.{kind}") for kind in ("convolution", "dot_general")]
    assert kinds == [94, 1]
    assert len(re.findall(r"precision\w* = \[[^]]*HIGHEST[^]]*HIGHEST[^]]*\]", program)) == 95


# Files.


def test_the_published_file_is_used_to_the_last_value_it_needs(weights):
    shapes = json.loads(KEYS.read_text())
    convolutions = [name for name in shapes if name.endswith(".conv.weight")]
    biases = [name for name in shapes if name.endswith(".bn.bias")]
    assert len(convolutions) == len(biases) == 94
    used = [*convolutions, *biases, "fc.weight"]  # the rest is folded into these, or not used
    assert len(pytree.flatten(weights)) == len(used)
    assert pytree.count(weights) == sum(int(np.prod(shapes[name])) for name in used)


def test_a_torch_file_without_counters_holds_the_same_weights(weights, published, tmp_path):
    file = tmp_path / inception.PUBLISHED
    counted = {name for name in published if name.endswith("num_batches_tracked")}
    torch_writer.save(file, {n: a for n, a in published.items() if n not in counted})
    read, expected = pytree.flatten(Inception(str(file)).load(no_pictures)), pytree.flatten(weights)
    assert len(counted) == 94 and read.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(read[name], leaf, err_msg=name)


@pytest.mark.parametrize("file", ["", "weights/absent.pth"])
def test_a_missing_file_is_told_with_where_to_find_it(file):
    with pytest.raises(UserError) as refusal:
        Inception(file).load(no_pictures)
    told = str(refusal.value)
    assert told.startswith(f"weights = {file!r}: no such file")
    assert "mseitzer/pytorch-fid, release fid_weights" in told and "nothing is downloaded" in told
    assert told.endswith("set weights=weights/pt_inception-2015-12-05-6726825d.pth")


def test_torchvisions_own_weights_are_refused(published, tmp_path):
    file = tmp_path / "inception_v3_google-0cc3c7bd.safetensors"
    auxiliary = {f"AuxLogits.{name}": np.zeros(1, np.float32) for name in "abcde"}
    head = {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    save_file(published | auxiliary | head, file)
    with pytest.raises(UserError) as refusal:
        Inception(str(file)).load(no_pictures)
    told = str(refusal.value)
    assert told.startswith(f"weights = '{file}': these are not the weights of")
    assert "left over: AuxLogits.a, AuxLogits.b, AuxLogits.c and 2 more; " in told
    assert "fc.weight (1000, 2048) for (1008, 2048), fc.bias (1000,) for (1008,);" in told
    assert "missing" not in told


def test_the_first_missing_names_are_told(published):
    lacking = {name: a for name, a in published.items() if not name.startswith("Mixed_7c")}
    with pytest.raises(ValueError) as refusal:
        inception_weights.from_published(lacking)
    first = "missing: Mixed_7c.branch1x1.conv.weight, Mixed_7c.branch1x1.bn.weight, "
    assert first in str(refusal.value) and "and 42 more" in str(refusal.value)
    assert "left over" not in str(refusal.value)


def test_inception_is_a_feature_space(space):
    assert isinstance(space, FeatureSpace)
    assert (space.frechet, space.reads_labels) == ("fid", False)
