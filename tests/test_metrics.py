"""Metrics against published definitions (golden vectors), closed forms and invariances, in float64.

Hand-made cases are small integers, on which float64 is exact and the expected number can be written
down; elsewhere the tolerances are a few roundings of the inputs.
"""

import json

import numpy as np
import pytest

from ig_jax.metrics import feature_classifier, precision_recall
from ig_jax.metrics.frechet import frechet_distance
from ig_jax.metrics.inception_score import inception_score
from ig_jax.metrics.moments import Moments

EPS = np.finfo(np.float64).eps


# Against the golden vectors.


@pytest.fixture
def golden(golden_dir):
    with np.load(golden_dir / "frechet.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def rounding(golden_dir):
    """name -> ten times the rounding that the published formula itself shows on these inputs."""
    levels = json.loads((golden_dir / "tolerances.json").read_text())["frechet"]
    return {name: 10 * level for name, level in levels.items()}


@pytest.fixture
def k(golden_dir):
    return json.loads((golden_dir / "configs.json").read_text())["frechet"]["k"]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["ref", "gen"])
def test_mean_and_covariance_are_the_published_ones(golden, name):
    moments = Moments.from_features(golden[f"feat_{name}"])
    for ours, theirs in (
        (moments.mean, golden[f"mu_{name}"]),
        (moments.covariance, golden[f"sigma_{name}"]),
    ):
        tolerance = 10 * EPS * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.golden
def test_frechet_distance_is_the_published_one(golden, rounding):
    reference = Moments.from_features(golden["feat_ref"])
    generated = Moments.from_features(golden["feat_gen"])
    # A lucky pair of references may agree to the last bit; a trace is still a sum of d roundings.
    floor = EPS * np.trace(reference.covariance + generated.covariance) * len(reference.mean)
    tolerance = max(rounding["frechet_vs_eigen_formula"], floor)
    assert abs(frechet_distance(reference, generated) - golden["frechet"]) <= tolerance
    assert abs(frechet_distance(reference, reference) - golden["frechet_self"]) <= tolerance


@pytest.mark.golden
def test_frechet_distance_needs_no_full_rank(golden):
    rows = int(golden["rank_deficient_n"])
    reference = Moments.from_features(golden["feat_ref"][:rows])
    generated = Moments.from_features(golden["feat_gen"][:rows])
    distance = frechet_distance(reference, generated)
    # The published matrix root leaves up to the root of one rounding in every direction.
    traces = np.trace(reference.covariance + generated.covariance)
    tolerance = len(reference.mean) * np.sqrt(EPS) * traces
    assert abs(distance - golden["frechet_rank_deficient"]) <= tolerance
    assert abs(distance - golden["frechet_rank_deficient_by_eigenvalues"]) <= tolerance


@pytest.mark.golden
def test_inception_score_is_the_published_one(golden):
    mean, per_split = inception_score(golden["is_logits"], int(golden["is_split_size"]))
    np.testing.assert_allclose(per_split, golden["is_per_split"], rtol=1e-13)
    assert mean == pytest.approx(golden["inception_score"], rel=1e-13)


@pytest.mark.golden
@pytest.mark.parametrize(("own", "other"), [("ref", "gen"), ("gen", "ref")])
def test_manifold_radii_and_membership_are_the_published_ones(golden, k, own, other):
    centres, points = golden[f"feat_{own}"], golden[f"feat_{other}"]
    radii = precision_recall.knn_radii(centres, k)
    np.testing.assert_allclose(radii, golden[f"radii_{own}"], rtol=1e-12)
    inside = precision_recall.inside_manifold(points, centres, radii)
    np.testing.assert_array_equal(inside, golden[f"{other}_inside_{own}_manifold"].astype(bool))


@pytest.mark.golden
def test_precision_and_recall_are_the_published_ones(golden, k):
    result = precision_recall.precision_recall(golden["feat_ref"], golden["feat_gen"], k)
    np.testing.assert_allclose(result, [golden["precision"], golden["recall"]], rtol=1e-15)


# Moments.


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def merged(features, cuts):
    moments = Moments.empty(features.shape[1])
    for batch in np.split(features, cuts):
        moments = moments.merge(Moments.from_features(batch))
    return moments


@pytest.mark.parametrize(
    "cuts",
    [[50], [1, 2, 3, 99], [0, 0, 70, 70, 100], list(range(1, 100))],
    ids=["halves", "uneven", "with empty ones", "single rows"],
)
def test_moments_do_not_depend_on_the_batches(rng, cuts):
    # The mean is 1e6 spreads away: a difference of raw second moments would keep 4 digits of 16.
    features = rng.normal(size=(100, 5)) @ rng.normal(size=(5, 5)) + 1e6
    moments = merged(features, cuts)
    assert moments.count == 100
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=100 * EPS)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, rtol=0, atol=1e-8)


def test_moments_of_three_points_by_hand():
    moments = Moments.from_features(np.array([[0, 0], [3, 0], [0, 6]]))
    assert moments.count == 3
    np.testing.assert_array_equal(moments.mean, [1, 2])
    np.testing.assert_array_equal(moments.covariance, [[3, -3], [-3, 12]])


def test_merging_with_empty_moments_changes_nothing(rng):
    whole = Moments.from_features(rng.normal(size=(9, 3)))
    for moments in (whole.merge(Moments.empty(3)), Moments.empty(3).merge(whole)):
        assert moments.count == 9
        np.testing.assert_array_equal(moments.mean, whole.mean)
        np.testing.assert_array_equal(moments.scatter, whole.scatter)
    assert Moments.empty(3).merge(Moments.empty(3)).count == 0


def test_float32_features_are_summed_in_float64():
    features = np.full((3000, 1), 0.1, np.float32)
    features[0] += np.float32(1)
    moments = Moments.from_features(features)
    assert moments.mean.dtype == moments.scatter.dtype == np.float64
    np.testing.assert_allclose(moments.mean, features.astype(np.float64).mean(axis=0), rtol=1e-15)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_bad_row_is_named(value):
    features = np.zeros((5, 2))
    features[[3, 4], 1] = value
    with pytest.raises(ValueError, match=r"features row 3 \(first of 2 among 5\)"):
        Moments.from_features(features)


def test_features_that_are_no_matrix_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\): must be \[n, d\]"):
        Moments.from_features(np.zeros((2, 3, 4)))


def test_merging_different_dimensions_is_refused():
    with pytest.raises(ValueError, match="dimension 3 and 2"):
        Moments.empty(3).merge(Moments.empty(2))


# Frechet distance.


def gaussian(mean, covariance):
    return Moments(count=5, mean=np.array(mean), scatter=4 * np.array(covariance))


@pytest.mark.parametrize("null_directions", [0, 3])
def test_frechet_distance_of_commuting_gaussians(rng, null_directions):
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    variances_a, variances_b = rng.uniform(0.5, 4, size=(2, 6))
    variances_a[:null_directions] = 0
    mean_a, mean_b = rng.normal(size=(2, 6))
    distance = frechet_distance(
        gaussian(mean_a, (axes * variances_a) @ axes.T),
        gaussian(mean_b, (axes * variances_b) @ axes.T),
    )
    spread = np.square(np.sqrt(variances_a) - np.sqrt(variances_b)).sum()
    expected = np.square(mean_a - mean_b).sum() + spread
    # In a direction that is null in one set only, the distance itself goes as the root of a change.
    assert distance == pytest.approx(expected, rel=1e-13 if null_directions == 0 else 1e-7)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    # In two dimensions (Tr M^(1/2))^2 = Tr M + 2 (det M)^(1/2) for the product M = a b.
    root_trace = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = 25 + np.trace(a + b) - 2 * root_trace
    distance = frechet_distance(gaussian([3.0, 0.0], a), gaussian([0.0, 4.0], b))
    assert distance == pytest.approx(expected, rel=1e-14)


def test_frechet_distance_of_fewer_samples_than_dimensions_keeps_its_digits(rng):
    features_a, features_b = rng.normal(size=(2, 8, 30)) * 10
    a, b = Moments.from_features(features_a), Moments.from_features(features_b)
    # With S = X^T X / (n - 1) the trace of the root is the nuclear norm of X_a X_b^T / (n - 1).
    product = (features_a - a.mean) @ (features_b - b.mean).T / 7
    root_trace = np.linalg.svd(product, compute_uv=False).sum()
    shift = np.square(a.mean - b.mean).sum()
    expected = shift + np.trace(a.covariance + b.covariance) - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)


def test_frechet_distance_is_symmetric(rng):
    a = Moments.from_features(rng.normal(size=(50, 8)))
    b = Moments.from_features(rng.normal(size=(40, 8)) * 2 + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-13)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_never_below(rng):
    for rows in range(2, 40):
        features = rng.normal(size=(rows, 12)) * 10
        a, b = Moments.from_features(features), merged(features, [rows // 2])
        assert 0 <= frechet_distance(a, b) < 1e-11  # traces of 1200; singular up to 12 rows


def test_frechet_distance_between_dimensions_is_refused(rng):
    a, b = (Moments.from_features(rng.normal(size=(9, d))) for d in (4, 5))
    with pytest.raises(ValueError, match="dimension 4 and 5"):
        frechet_distance(a, b)


@pytest.mark.parametrize("rows", [0, 1])
def test_frechet_distance_of_fewer_than_two_samples_is_refused(rng, rows):
    enough = Moments.from_features(rng.normal(size=(9, 4)))
    too_few = Moments.from_features(np.ones((rows, 4)))
    for pair in ((enough, too_few), (too_few, enough)):
        with pytest.raises(ValueError, match=f"covariance of {rows} samples: needs at least 2"):
            frechet_distance(*pair)


# Inception score.


def test_inception_score_of_an_undecided_classifier_is_one():
    mean, per_split = inception_score(np.full((12, 7), 3.5), split_size=5)
    assert len(per_split) == 3
    assert mean == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("confidence", [100, 1e5])  # at 1e5 probabilities underflow to 0
@pytest.mark.parametrize("predicted", [6, 4])  # of 6 classes: two may have no probability at all
def test_inception_score_of_sure_and_balanced_predictions_is_their_number(confidence, predicted):
    logits = confidence * np.tile(np.eye(6)[:predicted], (4, 1))
    assert inception_score(logits, split_size=2 * predicted)[0] == pytest.approx(predicted)


def test_inception_score_of_samples_sorted_by_class_is_one():
    logits = 100 * np.repeat(np.eye(6), 4, axis=0)
    assert inception_score(logits, split_size=4)[0] == pytest.approx(1, rel=1e-13)


def test_the_short_last_split_counts_as_much_as_the_others():
    logits = 100 * np.eye(4)[[0, 1, 2, 3, 0, 1]]
    mean, per_split = inception_score(logits, split_size=4)
    np.testing.assert_allclose(per_split, [4, 2], rtol=1e-13)
    assert mean == pytest.approx(3, rel=1e-13)


def test_inception_score_of_half_sure_predictions():
    # p = (3/4, 1/4) and its mirror image: KL to (1/2, 1/2) is log 2 - H(p), for both rows.
    logits = np.log([[0.75, 0.25], [0.25, 0.75]])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert inception_score(logits, split_size=2)[0] == pytest.approx(2 * np.exp(-entropy))


def test_inception_score_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match="split_size = 0"):
        inception_score(np.zeros((4, 2)), split_size=0)
    with pytest.raises(ValueError, match=r"logits has shape \(0, 2\)"):
        inception_score(np.zeros((0, 2)), split_size=4)
    with pytest.raises(ValueError, match="logits row 1"):
        inception_score(np.array([[0.0, 1.0], [np.nan, 0.0]]), split_size=4)


# Precision and recall.


LINE = np.array([[0.0], [1.0], [3.0], [7.0]])


@pytest.mark.parametrize(("k", "radii"), [(1, [1, 1, 4, 16]), (2, [9, 4, 9, 36])])
def test_radii_are_squared_and_do_not_count_the_point_itself(k, radii):
    np.testing.assert_array_equal(precision_recall.knn_radii(LINE, k), radii)


def test_rounding_leaves_no_radius_of_copies_below_zero(rng):
    copies = np.repeat(rng.normal(size=(50, 20)), 4, axis=0)
    radii = precision_recall.knn_radii(copies, k=3)
    assert radii.min() == 0
    assert radii.max() < 1e-12


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


def test_blocks_change_nothing_but_the_memory(rng, monkeypatch):
    reference, generated = rng.integers(0, 9, size=(37, 3)), rng.integers(2, 12, size=(50, 3))

    def results():
        return [
            *precision_recall.precision_recall(reference, generated, k=2),
            *precision_recall.knn_radii(reference, k=2),
            *precision_recall.nearest_distance(generated, reference),
        ]

    whole = results()
    for block in (1, 120):  # one row at a time; a few rows with a short last block
        monkeypatch.setattr(precision_recall, "BLOCK_DISTANCES", block)
        assert results() == whole  # integers: exact in any order


def test_no_block_exceeds_the_limit_unless_it_is_a_single_row(monkeypatch):
    monkeypatch.setattr(precision_recall, "BLOCK_DISTANCES", 100)
    for columns, rows in ((30, 3), (100, 1), (101, 1)):
        blocks = precision_recall._squared_distance_blocks(np.ones((7, 2)), np.ones((columns, 2)))
        shapes = [block.shape for block in blocks]
        assert max(shapes) == (rows, columns)
        assert sum(shape[0] for shape in shapes) == 7


@pytest.mark.parametrize("k", [0, 4, 5])
def test_a_neighbour_that_does_not_exist_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} with 4 points"):
        precision_recall.knn_radii(LINE, k)


def test_precision_between_dimensions_is_refused():
    with pytest.raises(ValueError, match="dimension 3 and 2"):
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
    with pytest.raises(ValueError, match="sets of 4 and 0 points"):
        precision_recall.nearest_distance(LINE, LINE[:0])


# Feature classifier.


@pytest.fixture(scope="module")
def digits():
    """uint8 NHWC images and labels of scikit-learn's digits, and which fifth is held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return pixels, labels, np.arange(len(labels)) % 5 == 0


@pytest.fixture(scope="module")
def classifier(digits):
    images, labels, held_out = digits
    return feature_classifier.fit(images[~held_out], labels[~held_out])


def test_the_classifier_reads_97_percent_of_unseen_digits(digits, classifier):
    images, labels, held_out = digits
    assert np.mean(classifier.predict(images[held_out]) == labels[held_out]) >= 0.97


def test_features_are_128_activations_and_the_logits_follow_from_them(digits, classifier):
    images, _, held_out = digits
    features = classifier.features(images[held_out])
    assert features.shape == (held_out.sum(), 128)
    assert features.dtype == np.float64
    assert features.min() == 0  # after the ReLU
    logits = classifier.logits(images[held_out])
    np.testing.assert_allclose(features @ classifier.weights[-1] + classifier.biases[-1], logits)


def test_features_are_nearer_to_real_digits_than_to_noise(digits, classifier, rng):
    images, _, held_out = digits
    noise = rng.integers(0, 256, size=images[held_out].shape, dtype=np.uint8)
    sets = (images[~held_out], images[held_out], noise)
    train, unseen, random = (Moments.from_features(classifier.features(x)) for x in sets)
    assert frechet_distance(train, unseen) < 0.05 * frechet_distance(train, random)


def test_uint8_and_floating_point_mean_the_same_picture(digits, classifier):
    images = digits[0][:20]
    features = classifier.features(images)
    exact = classifier.features(images / 127.5 - 1)
    np.testing.assert_array_equal(features, exact)
    single = classifier.features((images / 127.5 - 1).astype(np.float32))
    np.testing.assert_allclose(features, single, atol=1e-5)


def test_features_are_float64_even_after_fitting_on_float32(digits):
    images, labels, _ = digits
    single = (images[:60] / 127.5 - 1).astype(np.float32)
    assert feature_classifier.fit(single, labels[:60]).features(single).dtype == np.float64


def test_the_seed_alone_decides_the_classifier(digits):
    images, labels, _ = digits
    first, again, other = (
        feature_classifier.fit(images[:300], labels[:300], seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.features(images), again.features(images))
    assert np.abs(first.features(images) - other.features(images)).max() > 0.1


def test_labels_need_not_count_from_zero(digits):
    images, labels, _ = digits
    odd = labels % 2 == 1
    classifier = feature_classifier.fit(images[odd], labels[odd])
    assert classifier.classes.tolist() == [1, 3, 5, 7, 9]
    assert np.mean(classifier.predict(images[odd]) == labels[odd]) > 0.99


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((4, 8, 8, 1), np.int32), "images are int32: must be uint8, or floating"),
        (np.full((4, 8, 8, 1), 16.0), r"span \[16.0, 16.0\]: must lie in \[-1, 1\]"),
        (np.full((4, 8, 8, 1), -1.5), r"span \[-1.5, -1.5\]: must lie in \[-1, 1\]"),
        (np.full((4, 8, 8, 1), np.nan), r"must lie in \[-1, 1\]"),
        (np.zeros((4, 9, 8, 1)), r"shape \(4, 9, 8, 1\) have 72 values each: must be 64"),
    ],
)
def test_images_in_another_form_are_refused(classifier, images, message):
    with pytest.raises(ValueError, match=message):
        classifier.features(images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 2]), r"int64 of shape \(3,\): must be one integer for each of the 4"),
        (np.array([0.0, 1.0, 2.0, 3.0]), "labels are float64"),
        (np.array([0, 1, 0, 1]), "labels hold 2 classes"),
    ],
)
def test_labels_that_make_no_feature_space_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        feature_classifier.fit(np.zeros((4, 8, 8, 1)), labels)
