"""Principal components of tokens: what they are by hand, what changes nothing, what is refused."""

import numpy as np
import pytest
from PIL import Image

import ig_jax
from ig_jax.errors import UserError
from ig_jax.plots import image_grid
from ig_jax.plots.token_pca import normalised, principal_components


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def orthonormal(width: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(width, width)))
    return q


@pytest.fixture
def rank_3():
    """16 tokens of width 7 around a centre: centred coordinates at right angles, and their axes."""
    scores = np.random.default_rng(2).normal(size=(16, 3))
    scores, _ = np.linalg.qr(scores - scores.mean(0))
    coordinates, axes = scores * [5.0, 3.0, 2.0], orthonormal(7)[:3]
    return coordinates @ axes + np.arange(7.0), coordinates, axes


def test_components_of_tokens_of_rank_3_are_the_axes_they_were_made_of(rank_3):
    tokens, coordinates, axes = rank_3
    projections, components, variance = principal_components(tokens)
    signs = np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])
    np.testing.assert_allclose(components, axes * signs[:, None], rtol=0, atol=1e-12)
    np.testing.assert_allclose(projections, coordinates * signs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(variance, np.square([5.0, 3.0, 2.0]) / 15, rtol=1e-12)
    np.testing.assert_allclose(projections @ components + tokens.mean(0), tokens, atol=1e-12)


@pytest.mark.parametrize("n, width", [(16, 7), (9, 40), (400, 12)])
def test_components_are_those_of_the_covariance(rng, n, width):
    """More tokens than channels, and fewer."""
    rows = rng.normal(size=(2, n, width)) * np.linspace(1, 3, width)
    _, components, variance = principal_components(rows)
    for cell in range(2):
        values, vectors = np.linalg.eigh(np.cov(rows[cell].T))
        np.testing.assert_allclose(variance[cell], values[::-1][:3], rtol=1e-9)
        overlap = np.abs(np.sum(components[cell] * vectors.T[::-1][:3], axis=1))
        np.testing.assert_allclose(overlap, 1, rtol=0, atol=1e-9)


def test_colours_are_the_projections_scaled_and_tokens_are_row_by_row(rng):
    pca = ig_jax.token_pca(rng.normal(size=(2, 3, 25, 8)))
    assert pca.rgb.shape == (2, 3, 5, 5, 3) and pca.rgb.dtype == np.float32
    assert pca.projections.shape == (2, 3, 25, 3)
    assert pca.components.shape == (2, 3, 3, 8) and pca.explained_variance.shape == (2, 3, 3)
    p = pca.projections[1, 2]
    by_hand = (p - p.min(0)) / (p.max(0) - p.min(0))
    np.testing.assert_allclose(pca.rgb[1, 2], by_hand.reshape(5, 5, 3), atol=1e-6)
    assert np.all(pca.rgb.min((-3, -2)) == 0) and np.all(pca.rgb.max((-3, -2)) == 1)


def test_the_entry_of_largest_size_is_positive(rng):
    components = ig_jax.token_pca(rng.normal(size=(30, 16, 6))).components
    largest = np.take_along_axis(components, np.abs(components).argmax(-1)[..., None], -1)
    assert np.all(largest > 0)


def test_a_rotation_of_the_channels_changes_nothing_but_signs(rng):
    rows, rotation = rng.normal(size=(16, 9)), orthonormal(9)
    plain, turned = principal_components(rows), principal_components(rows @ rotation)
    signs = np.sign(np.sum(plain[0] * turned[0], axis=0))
    np.testing.assert_allclose(turned[0] * signs, plain[0], atol=1e-10)
    np.testing.assert_allclose(turned[1] * signs[:, None], plain[1] @ rotation, atol=1e-10)
    np.testing.assert_allclose(turned[2], plain[2], rtol=1e-10)


@pytest.mark.parametrize("norm", ["layer_norm", "min_max"])
def test_tokens_keep_their_colours_in_any_order(rng, norm):
    tokens, order = rng.normal(size=(25, 8)), rng.permutation(25)
    plain, moved = (ig_jax.token_pca(x, norm=norm) for x in (tokens, tokens[order]))
    colours, reordered = (p.rgb.reshape(25, 3) for p in (plain, moved))
    np.testing.assert_allclose(reordered, colours[order], atol=1e-5)
    np.testing.assert_allclose(moved.components, plain.components, atol=1e-5)


def test_norms_are_those_of_their_names(rng):
    tokens = rng.normal(2, 3, (2, 16, 8)).astype(np.float32)
    x = normalised(tokens, "layer_norm")
    np.testing.assert_allclose(x.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(x.var(-1), 1, atol=1e-5)
    x = normalised(tokens, "min_max")
    assert np.all(x.min(-2) == 0) and np.all((x.max(-2) < 1) & (x.max(-2) > 0.999))


def test_the_basis_shared_by_one_cell_is_that_of_the_cell(rng):
    tokens = rng.normal(size=(1, 16, 8))
    own, shared = (ig_jax.token_pca(tokens, basis=basis) for basis in ("cell", "shared"))
    np.testing.assert_array_equal(shared.rgb, own.rgb)
    np.testing.assert_array_equal(shared.projections, own.projections)
    np.testing.assert_array_equal(shared.components, own.components[0])
    np.testing.assert_array_equal(shared.explained_variance, own.explained_variance[0])


def test_a_shared_basis_gives_equal_tokens_equal_colours_in_every_cell(rng):
    """A basis of each cell does not: there the rest of the cell decides."""
    tokens = rng.normal(size=(2, 2, 16, 8))
    tokens[1, 1, 3] = tokens[0, 0, 9]
    own, shared = (ig_jax.token_pca(tokens, basis=basis).rgb for basis in ("cell", "shared"))
    np.testing.assert_allclose(shared[1, 1, 0, 3], shared[0, 0, 2, 1], atol=1e-6)
    assert np.abs(own[1, 1, 0, 3] - own[0, 0, 2, 1]).max() > 0.01
    assert shared.min() == 0 and shared.max() == 1


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_colours_without_a_component_are_black(rng, rank):
    scores = rng.normal(size=(16, rank)) * [[4.0, 2.0][:rank]]
    tokens = (scores @ orthonormal(8)[:rank]).astype(np.float32)
    projections, components, variance = principal_components(tokens.astype(np.float64))
    for array in (projections, components.T, variance[None]):
        assert not np.any(array[:, rank:]) and np.all(np.any(array[:, :rank], axis=0))
    if not rank:
        assert not np.any(ig_jax.token_pca(np.ones((16, 8))).rgb)


def test_tokens_of_two_channels_have_two_colours(rng):
    pca = ig_jax.token_pca(rng.normal(size=(16, 2)), norm="min_max")
    assert pca.components.shape == (3, 2)
    assert not np.any(pca.components[2]) and not np.any(pca.rgb[..., 2])
    assert pca.rgb[..., :2].max() == 1


@pytest.mark.parametrize(
    "tokens, options, sentence",
    [
        (np.zeros((1, 8)), {}, "tokens: 1 of them are no square image; there must be 4, 9, 16"),
        (np.zeros((2, 15, 8)), {}, "tokens: 15 of them are no square image"),
        (np.zeros(8), {}, r"tokens: have shape \(8,\), must be \[..., n, width\]"),
        (np.zeros((0, 16, 8)), {}, r"tokens: have shape \(0, 16, 8\), must be"),
        (np.full((16, 8), np.nan), {}, "tokens: are not finite; the network overflows"),
        (np.full((16, 8), np.inf), {}, "tokens: are not finite"),
        (np.zeros((16, 8)), {"norm": "rms"}, "norm = 'rms': must be layer_norm or min_max"),
        (np.zeros((16, 8)), {"basis": "all"}, "basis = 'all': must be cell or shared"),
    ],
)
def test_what_has_no_components_is_refused_in_a_sentence(tokens, options, sentence):
    with pytest.raises(UserError, match=sentence):
        ig_jax.token_pca(tokens, **options)


def test_a_table_shows_every_image_in_its_place_enlarged_to_one_size(rng, tmp_path):
    pixels = rng.integers(0, 256, (2, 8, 8, 1), np.uint8)
    tokens = rng.integers(0, 256, (2, 4, 4, 3), np.uint8)
    rows = {f"row {i}": [pixels[i], tokens[i]] for i in range(2)}
    canvas = image_grid.table(rows, ["image", "block 1"])
    image_grid.save(tmp_path / "table.png", canvas)
    with Image.open(tmp_path / "table.png") as image:
        np.testing.assert_array_equal(np.asarray(image), canvas)
    for i in range(2):
        tile = canvas[22 + i * 98 :][:96, 80:]
        np.testing.assert_array_equal(tile[6:96:12, 6:96:12], pixels[i].repeat(3, -1))
        np.testing.assert_array_equal(tile[12:96:24, 98 + 12 : 98 + 96 : 24], tokens[i])
