"""The tree in the plane: its density is exact, its samples follow it, its image shows both.

Integrals are sums over a grid finer than the narrowest Gaussian, which are then good to 1e-6.
"""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from configs import tree as tree_config
from ig_jax import modes
from ig_jax.data.sources.tree_density import THRESHOLD_POINTS, Branch, Tree
from ig_jax.evaluation.density_evaluator import DensityEvaluator
from ig_jax.plots import density_panels
from ig_jax.types import Source

TREE = Tree("train")
STEP = 0.016
CLASSES = (0, 1)


def of_class(label: int, points: np.ndarray) -> np.ndarray:
    return TREE.log_density(points, np.full(len(points), label))


def class_samples(label: int, n: int, seed: int) -> np.ndarray:
    points, labels = TREE.sample(2 * n, seed)
    return points[labels == label]


@pytest.fixture(scope="module")
def grid() -> np.ndarray:
    left, right, bottom, top = TREE.extent
    axes = np.arange(left, right, STEP), np.arange(bottom, top, STEP)
    return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)


@pytest.fixture(scope="module")
def on_grid(grid) -> list[np.ndarray]:
    """The log density of each class there."""
    return [of_class(label, grid) for label in CLASSES]


@pytest.mark.parametrize("label", CLASSES)
def test_the_density_of_a_class_integrates_to_one_within_the_extent(on_grid, label):
    assert np.exp(on_grid[label]).sum() * STEP**2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("label", CLASSES)
def test_samples_have_the_mean_log_density_that_the_integral_gives(on_grid, label):
    log_p = on_grid[label]
    found = of_class(label, class_samples(label, 20_000, seed=5))
    error = found.std() / np.sqrt(len(found))
    assert error < 0.01
    assert found.mean() == pytest.approx((np.exp(log_p) * log_p).sum() * STEP**2, abs=4 * error)


@pytest.mark.parametrize("label", CLASSES)
def test_samples_have_the_mean_and_the_covariance_that_the_integral_gives(grid, on_grid, label):
    mass = np.exp(on_grid[label]) * STEP**2
    mean = mass @ grid
    covariance = (grid - mean).T @ (mass[:, None] * (grid - mean))
    points = class_samples(label, 20_000, seed=6)
    np.testing.assert_allclose(points.mean(axis=0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(points.T), covariance, atol=0.03)


@pytest.mark.parametrize("quantile", [0.01, 0.4])
@pytest.mark.parametrize("label", CLASSES)
def test_the_stated_share_of_a_class_lies_below_the_threshold(on_grid, label, quantile):
    density = np.exp(on_grid[label]) * STEP**2
    below = density[on_grid[label] < TREE.threshold(quantile)].sum()
    error = np.sqrt(quantile * (1 - quantile) / THRESHOLD_POINTS)
    # The grid cuts the edge of the region into squares, which is good to a hundredth or two.
    assert below == pytest.approx(quantile, abs=4 * error + 0.02 * quantile)


def test_one_in_a_hundred_exact_samples_is_an_outlier():
    n = 40_000
    rate = TREE.outliers(*TREE.sample(n, seed=7))
    assert rate == pytest.approx(0.01, abs=4 * np.sqrt(0.01 * 0.99 / n))


def test_noise_makes_outliers_and_a_wrong_label_does():
    points, labels = TREE.sample(4000, seed=8)
    noise = np.random.default_rng(0).normal(size=points.shape)
    assert TREE.outliers(points + 0.1 * noise, labels) > 0.25
    # What is left of the wrong class is the stem.
    assert 0.6 < TREE.outliers(points, 1 - labels) < 0.9


def test_points_that_are_not_finite_are_outliers():
    points = np.array([[np.nan, 0], [np.inf, 0], [1e30, 0]], np.float32)
    assert TREE.is_outlier(points, np.array([0, 1, 1])).all()


def test_the_classes_are_mirror_images(grid, on_grid):
    np.testing.assert_allclose(of_class(0, grid * [-1, 1]), on_grid[1], rtol=1e-12, atol=1e-12)


def stem() -> np.ndarray:
    """Samples of both classes on the stem, well below the place where it parts."""
    points, _ = TREE.sample(20_000, seed=9)
    bottom, top = TREE.extent[2:]
    return points[points[:, 1] < bottom + 0.25 * (top - bottom)]


def test_the_classes_share_the_stem():
    assert 0.1 < len(stem()) / 20_000 < 0.3
    np.testing.assert_allclose(of_class(0, stem()), of_class(1, stem()), atol=1e-4)


@pytest.mark.parametrize("label", CLASSES)
def test_no_class_reaches_into_the_crown_of_the_other(label):
    points = class_samples(label, 10_000, seed=10)
    crown = points[points[:, 1] > 0]
    assert len(crown) > 5000
    assert of_class(1 - label, crown).max() < TREE.threshold()


def test_the_density_is_the_same_all_along_a_ridge():
    bottom, top = TREE.extent[2:]
    height = bottom + np.linspace(0.15, 0.25, 200) * (top - bottom)
    ridge = of_class(1, np.stack([np.zeros(200), height], axis=1))
    # The slight taper lets wider places shine a little into narrower ones.
    assert np.ptp(ridge) < 1e-3


def test_a_branch_is_as_long_as_stated_and_turns_evenly_to_the_right():
    branch = Branch(1 + 2j, heading=20.0, length=0.7, bend=50.0, width=0.1)
    steps = np.diff(branch.at(np.linspace(0, 1, 1001)))
    np.testing.assert_allclose(np.abs(steps), 0.7 / 1000, rtol=1e-6)
    right_of_upright = np.rad2deg(np.angle(1j / steps))
    np.testing.assert_allclose(right_of_upright, 20 + 50 * (np.arange(1000) + 0.5) / 1000)


def test_a_child_starts_where_its_parent_ends_turned_and_narrower():
    parent = Branch(1 + 2j, heading=20.0, length=0.7, bend=50.0, width=0.1)
    child = parent.child(0.5, turn=-30.0, bend=10.0)
    assert child.at(0.0) == parent.at(1.0)
    assert child == (child.start, pytest.approx(40), 0.5, 10, pytest.approx(0.088))


def everything(split: str) -> dict[str, np.ndarray]:
    source = Tree(split)
    return source.batch(np.arange(len(source)))


def test_it_is_a_source_of_one_pixel_images_of_two_channels():
    assert isinstance(TREE, Source)
    batch = TREE.batch(np.array([3, 1, 4]))
    assert batch["stored"].shape == (3, *TREE.stored_shape) == (3, 1, 1, 2)
    assert batch["stored"].dtype == TREE.stored_dtype == np.float32
    assert batch["label"].shape == (3,) and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["stored"], everything("train")["stored"][[3, 1, 4]])


@pytest.mark.parametrize(("split", "size"), [("train", 20_000), ("held_out", 10_000)])
def test_a_split_is_drawn_once_from_the_density_with_equally_frequent_classes(split, size):
    first, again = everything(split), everything(split)
    np.testing.assert_array_equal(first["stored"], again["stored"])
    assert np.bincount(first["label"]).tolist() == [size // 2, size // 2]
    rate = TREE.outliers(first["stored"].reshape(-1, 2), first["label"])
    assert rate == pytest.approx(0.01, abs=4 * np.sqrt(0.01 * 0.99 / size))


def test_no_held_out_point_is_trained_on():
    assert TREE.held_out() == Tree("held_out") and Tree("held_out").held_out() is None
    held_out, train = everything("held_out")["stored"], everything("train")["stored"]
    assert not set(map(bytes, held_out)) & set(map(bytes, train))


def test_the_scale_is_that_of_unit_noise(grid, on_grid):
    mass = sum(np.exp(log_p) for log_p in on_grid) * STEP**2 / 2
    np.testing.assert_allclose(mass @ grid, 0, atol=1e-6)
    squares = mass @ grid**2
    assert squares.mean() == pytest.approx(1, abs=1e-5)
    assert 0.8 < np.sqrt(squares.min()) < np.sqrt(squares.max()) < 1.2


def test_another_split_and_another_class_are_refused():
    with pytest.raises(ValueError, match="split = 'test': must be one of train, held_out"):
        Tree("test")
    with pytest.raises(ValueError, match="label 2: the tree has the classes 0 and 1"):
        TREE.log_density(np.zeros((2, 2)), np.array([1, 2]))


def samples_without_outliers(n: int):
    points, labels = TREE.sample(n, seed=11)
    kept = ~TREE.is_outlier(points, labels)
    return points[kept], labels[kept]


def strays(n: int):
    points, labels = TREE.sample(n, seed=12)
    return points + np.array([0.3, 0.0]), labels


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> np.ndarray:
    path = tmp_path_factory.mktemp("panel") / "toy.png"
    clean, stray = samples_without_outliers(500), strays(500)
    named = {"a": clean, "b": stray, "c": clean, "d": stray}
    density_panels.draw(path, TREE, named, dict.fromkeys(named, 0.0))
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def cells(picture: np.ndarray) -> list[np.ndarray]:
    """Two rows of three, without the legend below."""
    height, width = (picture.shape[0] - 70) // 2, picture.shape[1] // 3
    return [
        picture[row * height :, column * width :][:height, :width]
        for row in range(2)
        for column in range(3)
    ]


def near(cell: np.ndarray, colour: str) -> int:
    """Number of pixels of nearly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(cell - wanted).max(axis=-1) < 40).sum())


def test_the_picture_is_twice_as_wide_as_a_readme_and_has_a_row_for_three_panels(picture):
    height, width, _ = picture.shape
    left, right, bottom, top = TREE.extent
    assert width == 1800
    assert height == pytest.approx(2 * 600 * (top - bottom) / (right - left) + 190, abs=2)


def test_outliers_have_their_colour_in_their_panel_only(picture):
    counts = [near(cell, density_panels.OUTLIER) for cell in cells(picture)]
    assert [count > 200 for count in counts] == [False, True, False, True, False, False]
    assert counts[0] == counts[2] == 0


def test_each_class_is_drawn_on_its_side_in_its_colour(picture):
    cell = cells(picture)[0]
    crown = cell[: cell.shape[0] // 2]
    red, _, blue = np.moveaxis(crown, -1, 0)
    middle = crown.shape[1] // 2
    bluish, orange = ((difference > 60).nonzero()[1] for difference in (blue - red, red - blue))
    assert min(len(bluish), len(orange)) > 500
    assert bluish.max() < middle < orange.min()


def test_panels_without_samples_stay_empty(picture):
    assert all((cell == 255).all() for cell in cells(picture)[4:])


def test_each_panel_is_titled_with_its_name_and_its_outlier_rate(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    named = {"data": samples_without_outliers(10), "IG 1.5": strays(10)}
    density_panels.draw(tmp_path / "a.png", TREE, named, {"IG 1.5": 0.0932, "data": 0.01})
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles == ["data: 1.0 % outliers", "IG 1.5: 9.3 % outliers", ""]


def test_the_judge_of_a_density_finds_exact_samples_faultless_and_noise_not():
    evaluator = DensityEvaluator(TREE, TREE.held_out())
    points, labels = TREE.sample(4000, seed=9)
    samples = points.reshape(-1, 1, 1, 2).astype(np.float32)
    good = evaluator.compute(evaluator.extract(samples), labels)
    assert good["outliers"] < 0.02 and good["recall"] > 0.94
    half = evaluator.compute(evaluator.extract(samples * [1.0, 0.5]), labels)
    assert half["outliers"] > 0.5 and half["recall"] < good["recall"] - 0.1


@pytest.mark.slow
def test_the_toy_s_demo_draws_a_panel_with_the_readout_alone_and_a_rate_for_each(tmp_path):
    c = tree_config.get_config()
    c.train.steps, c.checkpoint.every_steps = 100, 100
    c.model.depth = c.model.unroll = 2
    c.sample.batch_size, c.evaluate.num, c.evaluate.seeds = 200, 200, (0,)
    c.sample.sampler.num_steps = 3
    results = modes.run(c, workdir=str(tmp_path), mode="demo")
    ways = ["floor", "readout", "plain", "ig", "cfg", "ig_cfg"]
    assert [name for name in results if name in ways] == ways
    assert all(0 <= results[way]["outliers"]["mean"] <= 1 for way in ways)
    assert (tmp_path / "samples.png").stat().st_size > 50_000
