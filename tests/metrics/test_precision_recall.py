"""Precision, recall and nearest distance against golden vectors, closed forms and invariances.

Hand-made cases are small integers, on which float32 is exact and the expected number can be written
down; elsewhere the tolerance is the rounding of an expanded square.
"""

import jax
import numpy as np
import pytest
from tiers import slow_but
from vectors import golden_entry, golden_file

from ig_jax.metrics import precision_recall


def rounding(points):
    """What float32 makes of |u|^2 - 2 u.v + |v|^2 once the points are centred."""
    norms = np.square(points - points.mean(axis=0)).sum(axis=1)
    return 8 * np.finfo(np.float32).eps * norms.max()


@pytest.fixture
def rng():
    return np.random.default_rng(20)


# Against the golden vectors.


@pytest.fixture
def golden(golden_dir):
    with np.load(golden_file(golden_dir, "frechet.npz")) as arrays:
        return dict(arrays)


@pytest.fixture
def k(golden_dir):
    return golden_entry(golden_dir, "configs.json", "frechet")["k"]


@pytest.mark.golden
@pytest.mark.parametrize(("own", "other"), [("ref", "gen"), ("gen", "ref")])
def test_manifold_radii_and_membership_are_the_published_ones(golden, k, own, other):
    centres, points = golden[f"feat_{own}"], golden[f"feat_{other}"]
    radii = precision_recall.knn_radii(centres, k)
    np.testing.assert_allclose(radii, golden[f"radii_{own}"], rtol=0, atol=rounding(centres))
    inside = precision_recall.inside_manifold(points, centres, radii)
    np.testing.assert_array_equal(inside, golden[f"{other}_inside_{own}_manifold"].astype(bool))


@pytest.mark.golden
def test_precision_and_recall_are_the_published_ones(golden, k):
    result = precision_recall.precision_recall(golden["feat_ref"], golden["feat_gen"], k)
    np.testing.assert_allclose(result, [golden["precision"], golden["recall"]], rtol=1e-15)


# Closed forms.


LINE = np.array([[0.0], [1.0], [3.0], [7.0]])


@pytest.mark.parametrize(("k", "radii"), [(1, [1, 1, 4, 16]), (2, [9, 4, 9, 36])])
def test_radii_are_squared_and_do_not_count_the_point_itself(k, radii):
    np.testing.assert_array_equal(precision_recall.knn_radii(LINE, k), radii)


def test_rounding_leaves_no_radius_of_copies_below_zero(rng):
    copies = np.repeat(rng.normal(size=(50, 20)), 4, axis=0)
    radii = precision_recall.knn_radii(copies, k=3)
    assert radii.min() == 0
    assert 0 < radii.max() < rounding(copies)


def test_the_surface_of_a_ball_is_inside():
    radii = np.array([1.0, 0.0, 0.0, 16.0])
    points = np.array([[-1.0], [-1.25], [2.0], [2.75], [11.0], [11.25], [3.0]])
    inside = precision_recall.inside_manifold(points, LINE, radii)
    assert inside.tolist() == [True, False, False, False, True, False, True]


def test_identical_sets_have_full_precision_and_recall(rng):
    features = rng.normal(size=(60, 4))
    assert precision_recall.precision_recall(features, features.copy()) == (1, 1)


def test_disjoint_sets_have_neither_precision_nor_recall(rng):
    features = rng.normal(size=(60, 4))
    assert precision_recall.precision_recall(features, features + 100) == (0, 0)


def test_a_generator_of_one_mode_of_two_has_precision_without_recall(rng):
    modes = rng.normal(size=(2, 100, 3)) + np.array([[[0.0]], [[100.0]]])
    reference, generated = modes.reshape(200, 3), modes[0] * 0.5
    precision, recall = precision_recall.precision_recall(reference, generated)
    assert precision == 1
    assert 0 < recall <= 0.5


def everything(reference, generated):
    """All results at once: two shares, radii, memberships, distances."""
    radii = precision_recall.knn_radii(reference, k=2)
    return (
        np.array(precision_recall.precision_recall(reference, generated, k=2)),
        radii,
        precision_recall.inside_manifold(generated, reference, radii),
        precision_recall.nearest_distance(generated, reference),
    )


def assert_same(results, expected, reference):
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=rounding(reference))


@pytest.fixture
def overlapping(rng):
    return rng.normal(size=(37, 3)), rng.normal(size=(51, 3)) * 1.5 + 0.5


# One row at a time; a few, with a short last block.
@pytest.mark.parametrize("block", slow_but([120], [1, 120]))
def test_blocks_change_nothing_but_the_memory(overlapping, monkeypatch, block):
    whole = everything(*overlapping)
    assert 0 < whole[0].min() <= whole[0].max() < 1
    monkeypatch.setattr(precision_recall, "BLOCK_DISTANCES", block)
    assert_same(everything(*overlapping), whole, overlapping[0])


def test_the_number_of_devices_changes_nothing(overlapping, monkeypatch):
    several = everything(*overlapping)  # 37 and 51 rows do not divide over two
    devices = jax.local_devices()
    assert len(devices) > 1
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
    assert_same(everything(*overlapping), several, overlapping[0])


def test_a_second_call_compiles_nothing(overlapping):
    everything(*overlapping)
    compiled = precision_recall._reduced._cache_size()
    assert compiled > 0
    everything(*overlapping)
    assert precision_recall._reduced._cache_size() == compiled


def test_the_order_of_the_points_does_not_matter(overlapping, rng):
    reference, generated = overlapping
    counted = precision_recall.precision_recall(reference, generated)
    shuffled = precision_recall.precision_recall(rng.permutation(reference), generated[::-1])
    assert shuffled == counted


def test_a_common_offset_costs_no_digits(overlapping):
    # Squares of 1e5 in float32 round at 1e3: without the move, every distance would be noise.
    moved = [points + 1e5 for points in overlapping]
    assert_same(everything(*moved), everything(*overlapping), overlapping[0])


def test_distances_never_exist_all_at_once_nor_leave_their_device(monkeypatch):
    monkeypatch.setattr(precision_recall, "BLOCK_DISTANCES", 20_000)
    lowered = []

    def lower_only(*arguments):
        lowered.append(reduced.lower(*arguments).compile())
        return reduced(*arguments)

    reduced = precision_recall._reduced
    monkeypatch.setattr(precision_recall, "_reduced", lower_only)
    everything(np.eye(2000, 3), np.ones((2000, 3)))
    assert len(lowered) == 7
    for program in lowered:
        # 20,000 distances are 80 kB; all those of one of the two devices would be 8 MB.
        assert program.memory_analysis().temp_size_in_bytes < 400_000
        assert "all-" not in program.as_text()


@pytest.mark.parametrize("k", [0, 4, 5])
def test_a_neighbour_that_does_not_exist_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} with 4 points"):
        precision_recall.knn_radii(LINE, k)


def test_precision_between_dimensions_is_refused():
    with pytest.raises(ValueError, match="dimension 2 and 3"):
        precision_recall.precision_recall(np.ones((9, 2)), np.ones((9, 3)))


def test_the_set_with_the_bad_row_is_named():
    bad = np.array([[0.0], [np.inf], [1.0], [2.0]])
    with pytest.raises(ValueError, match="generated row 1"):
        precision_recall.precision_recall(LINE, bad)
    with pytest.raises(ValueError, match="reference row 1"):
        precision_recall.nearest_distance(LINE, bad)


def test_nearest_distance_is_euclidean():
    reference = np.array([[0.0, 0.0], [10.0, 0.0]])
    distances = precision_recall.nearest_distance(np.array([[3.0, 4.0], [10.0, 2.0]]), reference)
    np.testing.assert_array_equal(distances, [5, 2])


def test_a_copied_image_is_at_distance_zero_exactly(rng):
    reference = rng.normal(size=(20, 30)) + 1000
    distances = precision_recall.nearest_distance(reference[[7, 3]], reference)
    np.testing.assert_array_equal(distances, [0, 0])


def test_nearest_distance_to_nothing_is_refused():
    with pytest.raises(ValueError, match="reference holds no points"):
        precision_recall.nearest_distance(LINE, LINE[:0])
