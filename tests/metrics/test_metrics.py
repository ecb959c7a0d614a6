"""Metrics against published definitions (golden vectors), closed forms and invariances, in float64.

Hand-made cases are small integers, on which float64 is exact and the expected number can be written
down; elsewhere the tolerances are a few roundings of the inputs.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from vectors import golden_entry, golden_file

from ig_jax.errors import UserError
from ig_jax.metrics import moments as moments_module
from ig_jax.metrics.classifier import Classifier
from ig_jax.metrics.frechet import frechet_distance
from ig_jax.metrics.inception_score import inception_score, inception_score_torch_fidelity
from ig_jax.metrics.moments import Gaussian, Moments

EPS = np.finfo(np.float64).eps


# Against the golden vectors.


@pytest.fixture
def golden(golden_dir):
    with np.load(golden_file(golden_dir, "frechet.npz")) as arrays:
        return dict(arrays)


@pytest.fixture
def rounding(golden_dir):
    """name -> ten times the rounding that the published formula itself shows on these inputs."""
    levels = golden_entry(golden_dir, "tolerances.json", "frechet")
    return {name: 10 * level for name, level in levels.items()}


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
    reference = Moments.from_features(golden["feat_ref"]).gaussian
    generated = Moments.from_features(golden["feat_gen"]).gaussian
    # A lucky pair of references may agree to the last bit; a trace is still a sum of d roundings.
    floor = EPS * np.trace(reference.covariance + generated.covariance) * len(reference.mean)
    tolerance = max(rounding["frechet_vs_eigen_formula"], floor)
    assert abs(frechet_distance(reference, generated) - golden["frechet"]) <= tolerance
    assert abs(frechet_distance(reference, reference) - golden["frechet_self"]) <= tolerance


@pytest.mark.golden
def test_frechet_distance_needs_no_full_rank(golden):
    rows = int(golden["rank_deficient_n"])
    reference = Moments.from_features(golden["feat_ref"][:rows]).gaussian
    generated = Moments.from_features(golden["feat_gen"][:rows]).gaussian
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


def test_a_memory_mapped_file_is_read_in_blocks(rng, tmp_path, monkeypatch):
    np.save(tmp_path / "features.npy", rng.normal(size=(23, 3)).astype(np.float32))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    in_blocks, from_block = [], Moments._from_block
    monkeypatch.setattr(Moments, "_from_block", lambda b: in_blocks.append(b) or from_block(b))
    monkeypatch.setattr(moments_module, "BLOCK_ROWS", 10)
    moments = Moments.from_features(mapped)
    assert [block.shape for block in in_blocks] == [(10, 3), (10, 3), (3, 3)]
    np.testing.assert_allclose(moments.covariance, np.cov(mapped, rowvar=False), rtol=1e-6)
    with pytest.raises(ValueError, match="features row 15 of 23 holds NaN"):
        Moments.from_features(np.where(np.arange(23)[:, None] == 15, np.nan, mapped))


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
    with pytest.raises(ValueError, match="features row 3 of 5 holds NaN or infinity"):
        Moments.from_features(features)


def test_features_that_are_no_matrix_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\): must be \[n, d\]"):
        Moments.from_features(np.zeros((2, 3, 4)))


def test_merging_different_dimensions_is_refused():
    with pytest.raises(ValueError, match="dimension 3 and 2"):
        Moments.empty(3).merge(Moments.empty(2))


# Frechet distance.


def gaussian(mean, covariance):
    return Gaussian(np.array(mean), np.array(covariance))


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
    a, b = (Moments.from_features(rows).gaussian for rows in (features_a, features_b))
    # With S = X^T X / (n - 1) the trace of the root is the nuclear norm of X_a X_b^T / (n - 1).
    product = (features_a - a.mean) @ (features_b - b.mean).T / 7
    root_trace = np.linalg.svd(product, compute_uv=False).sum()
    shift = np.square(a.mean - b.mean).sum()
    expected = shift + np.trace(a.covariance + b.covariance) - 2 * root_trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)


def test_frechet_distance_is_symmetric(rng):
    a = Moments.from_features(rng.normal(size=(50, 8))).gaussian
    b = Moments.from_features(rng.normal(size=(40, 8)) * 2 + 1).gaussian
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-13)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_never_below(rng):
    for rows in range(2, 40):
        features = rng.normal(size=(rows, 12)) * 10
        a, b = Moments.from_features(features), merged(features, [rows // 2])
        assert (
            0 <= frechet_distance(a.gaussian, b.gaussian) < 1e-11
        )  # traces of 1200; singular up to 12 rows


def test_frechet_distance_between_dimensions_is_refused(rng):
    a, b = (Moments.from_features(rng.normal(size=(9, d))).gaussian for d in (4, 5))
    with pytest.raises(ValueError, match="dimension 4 and 5"):
        frechet_distance(a, b)


@pytest.mark.parametrize("rows", [0, 1])
def test_fewer_than_two_samples_make_no_gaussian(rows):
    with pytest.raises(ValueError, match=f"covariance of {rows} samples: needs at least 2"):
        _ = Moments.from_features(np.ones((rows, 4))).gaussian


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
    with pytest.raises(ValueError, match="logits row 1 of 2"):
        inception_score(np.array([[0.0, 1.0], [np.nan, 0.0]]), split_size=4)


# Inception score of torch-fidelity.


def test_torch_fidelity_shuffles_before_it_splits():
    # Sorted by class: without the shuffle each of ten splits would hold one class, and score 1.
    logits = 100 * np.repeat(np.eye(10), 500, axis=0)
    mean, std = inception_score_torch_fidelity(logits)
    assert 9.8 < mean < 10
    assert 0 < std < 0.1


def test_torch_fidelity_score_is_the_one_of_its_formula(rng):
    logits = rng.normal(size=(47, 5)) * 3  # ten parts of 4 or 5 rows
    shuffled = logits[np.random.RandomState(2020).permutation(47)]
    p = np.exp(shuffled) / np.exp(shuffled).sum(axis=1, keepdims=True)
    scores = []
    for i in range(10):
        part = p[i * 47 // 10 : (i + 1) * 47 // 10]
        divergence = (part * np.log(part / part.mean(axis=0))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    spread = np.sqrt(np.square(scores - np.mean(scores)).sum() / 10)
    expected = (np.mean(scores), spread)
    assert inception_score_torch_fidelity(logits) == pytest.approx(expected, rel=1e-12)


def test_torch_fidelity_score_needs_a_row_for_each_split():
    with pytest.raises(ValueError, match="logits has 9 rows: torch-fidelity's score cuts them"):
        inception_score_torch_fidelity(np.zeros((9, 3)))
    with pytest.raises(ValueError, match="logits row 1 of 12"):
        inception_score_torch_fidelity(np.array([[0.0], [np.nan]] * 6))


# Feature classifier.


@pytest.fixture(scope="module")
def digits():
    """uint8 NHWC images and labels of scikit-learn's digits, and which fifth is held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return pixels, labels, np.arange(len(labels)) % 5 == 0


@pytest.fixture(scope="module")
def weights(digits):
    images, labels, held_out = digits
    return Classifier().load(lambda: (images[~held_out], labels[~held_out]))


def test_the_classifier_reads_97_percent_of_unseen_digits(digits, weights):
    images, labels, held_out = digits
    logits = Classifier()(weights, jnp.asarray(images[held_out])).logits
    assert np.mean(np.argmax(logits, axis=1) == labels[held_out]) >= 0.97


def test_features_are_128_activations_and_the_logits_follow_from_them(digits, weights):
    images, _, held_out = digits
    found = Classifier()(weights, jnp.asarray(images[held_out]))
    assert found.pool.shape == (held_out.sum(), 128)
    assert found.pool.dtype == jnp.float32
    assert found.pool.min() == 0  # after the ReLU
    assert found.spatial is None
    last = weights["classes"]
    expected = np.asarray(found.pool, np.float64) @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(found.logits, expected, atol=1e-4)


def test_features_are_nearer_to_real_digits_than_to_noise(digits, weights, rng):
    images, _, held_out = digits
    noise = rng.integers(0, 256, size=images[held_out].shape, dtype=np.uint8)
    sets = (images[~held_out], images[held_out], noise)
    pools = [np.asarray(Classifier()(weights, jnp.asarray(x)).pool) for x in sets]
    train, unseen, random = (Moments.from_features(pool).gaussian for pool in pools)
    assert frechet_distance(train, unseen) < 0.05 * frechet_distance(train, random)


def test_the_same_pictures_give_the_same_classifier(digits):
    images, labels, _ = digits
    first, again, other = (
        Classifier().load(lambda n=n: (images[:n], labels[:n]))["hidden"]["kernel"]
        for n in (300, 300, 301)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8, 8, 1), np.float32), np.arange(4), "uint8 images, but these are float32"),
        (
            np.zeros((4, 8, 8, 1), np.uint8),
            np.zeros(4, int),
            "two at least, but the images",
        ),
        (np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 3, 1]), r"have \[0, 1, 3\]; use inc"),
    ],
)
def test_pictures_that_make_no_feature_space_are_refused(images, labels, message):
    with pytest.raises(UserError, match=f"^name = 'classifier': .*{message}"):
        Classifier().load(lambda: (images, labels))


def test_two_classes_have_a_logit_each(digits):
    images, labels, held_out = digits
    few = labels < 2
    weights = Classifier().load(lambda: (images[few & ~held_out], labels[few & ~held_out]))
    found = Classifier()(weights, jnp.asarray(images[few & held_out]))
    assert found.logits.shape == (np.sum(few & held_out), 2)
    assert np.mean(np.argmax(found.logits, axis=1) == labels[few & held_out]) >= 0.97
