"""Files of real images' statistics of every kind, as their tools write them, and broken ones."""

import hashlib
import os
import pickle
import tracemalloc

import numpy as np
import pytest

from ig_jax.errors import UserError
from ig_jax.io import numpy_pickle
from ig_jax.io.torch import unpickler
from ig_jax.metrics import reference_statistics
from ig_jax.metrics.moments import Gaussian

FIELD = "evaluate.reference"
PICTURES = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "statistics"


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def gaussian(rng, dim):
    return Gaussian(rng.normal(size=dim), np.cov(rng.normal(size=(9, dim)), rowvar=False))


@pytest.fixture
def pool(rng):
    return gaussian(rng, 4)


@pytest.fixture
def spatial(rng):
    return gaussian(rng, 3)


def save(path, **arrays):
    # A file object, since numpy gives a bare name the ending .npz.
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_array_equal(ours, theirs)


def refusal(path):
    with pytest.raises(UserError) as caught:
        reference_statistics.read(path, FIELD)
    message = str(caught.value)
    assert message.startswith(f"{FIELD} = {path}: ")
    assert "\n" not in message
    return message


# What each tool writes


def test_a_file_of_adm_has_statistics_and_pictures(path, pool, spatial):
    mean = pool.mean.astype(np.float32)  # as theirs is
    names = {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    save(path, arr_0=PICTURES, mu=mean, sigma=pool.covariance, **names)
    found = reference_statistics.read(path, FIELD)
    assert_equal(found.pool, (mean, pool.covariance))
    assert_equal(found.spatial, spatial)
    np.testing.assert_array_equal(found.images, PICTURES)
    assert not found.images.flags.owndata
    assert (found.rows, found.space) == (None, "")
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["", "ref_"], ids=["MAR", "MeanFlow"])
def test_small_derivatives_have_pooled_statistics_only(path, pool, prefix):
    save(path, **{f"{prefix}mu": pool.mean, f"{prefix}sigma": pool.covariance})
    found = reference_statistics.read(path, FIELD)
    assert_equal(found.pool, pool)
    assert found[1:5] == (None, None, None, "")


def test_a_file_of_samples_has_pictures_only(path):
    save(path, arr_0=PICTURES, arr_1=np.arange(5))
    found = reference_statistics.read(path, FIELD)
    np.testing.assert_array_equal(found.images, PICTURES)
    assert (found.pool, found.spatial, found.rows) == (None, None, None)


@pytest.mark.parametrize("with_spatial", [True, False])
def test_what_is_written_is_read_again(path, rng, pool, spatial, with_spatial):
    rows, spatial = rng.normal(size=(7, 4)).astype(np.float32), spatial if with_spatial else None
    reference_statistics.write(path, pool, spatial, rows, space="a1" * 32, count=1_281_167)
    found = reference_statistics.read(path, FIELD)
    assert_equal(found.pool, pool)
    if with_spatial:
        assert_equal(found.spatial, spatial)
    else:
        assert found.spatial is None
    np.testing.assert_array_equal(found.rows, rows)
    assert found.rows.dtype == np.float32
    assert (found.images, found.space) == (None, "a1" * 32)
    with np.load(path) as arrays:
        assert arrays["count"] == 1_281_167


@pytest.fixture(params=[2, 3, 4, 5])
def protocol(request):
    return request.param


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("numpy_1", [False, True])
def test_a_pickle_of_edm2_has_pooled_statistics(path, pool, protocol, numpy_1, columns_first):
    covariance = np.asfortranarray(pool.covariance) if columns_first else pool.covariance
    arrays = {"mu": pool.mean.astype(">f4"), "sigma": covariance}
    saved = {"fid": arrays, "fd_dinov2": {"mu": np.zeros(2), "num": np.float64(3)}}
    program = pickle.dumps(saved, protocol)
    path.write_bytes(_as_numpy_1(program) if numpy_1 else program)
    found = reference_statistics.read(path, FIELD)
    assert_equal(found.pool, (pool.mean.astype(np.float32), pool.covariance))
    assert found[1:5] == (None, None, None, "")


def test_a_pickle_of_several_encoders_gives_the_statistics_of_the_one_asked_for(path, pool, rng):
    other = gaussian(rng, 6)
    saved = {"fid": good(pool), "fd_dinov2": good(other)}
    path.write_bytes(pickle.dumps(saved))
    assert_equal(reference_statistics.read(path, FIELD, "fd_dinov2").pool, other)
    assert_equal(reference_statistics.read(path, FIELD, "fid").pool, pool)
    with pytest.raises(UserError, match="has statistics of 'fid', 'fd_dinov2', none of 'fd';"):
        reference_statistics.read(path, FIELD, "fd")


def _as_numpy_1(program):
    """The same pickle with the module's name of numpy 1, which is a byte shorter."""
    for module in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old = module.replace(b"_core", b"core")
        program = program.replace(bytes([len(module)]) + module, bytes([len(old)]) + old)
        program = program.replace(b"c" + module, b"c" + old)
    assert b"_core" not in program
    return _without_frames(program)


def _without_frames(program):
    # A frame says how many bytes follow, which are fewer now; it is not needed.
    place = program.find(b"\x95", 2, 3)
    return program if place < 0 else program[:place] + program[place + 9 :]


@pytest.mark.parametrize("prefix", ["", "ref_"])
def test_a_pickle_of_the_names_of_an_npz_is_read_as_one(path, pool, spatial, protocol, prefix):
    saved = {f"{prefix}mu": pool.mean, f"{prefix}sigma": pool.covariance, "n": 5, "by": "a tool"}
    spatial_too = {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    path.write_bytes(pickle.dumps(saved | spatial_too, protocol))
    found = reference_statistics.read(path, FIELD)
    assert_equal(found.pool, pool)
    assert_equal(found.spatial, spatial)


def test_numbers_and_arrays_of_a_pickle_keep_their_types(path, protocol):
    shared = np.arange(6, dtype=np.int16).reshape(2, 3)
    saved = [shared, (shared.T, {"n": np.float32(0.5)}), np.zeros((0, 2)), "text", b"bytes", 7]
    path.write_bytes(pickle.dumps(saved, protocol))
    found = numpy_pickle.load(path)
    np.testing.assert_array_equal(found[0], shared)
    assert found[0].dtype == np.int16
    assert not found[0].flags.writeable
    np.testing.assert_array_equal(found[1][0], shared.T)
    assert found[1][1] == {"n": np.float32(0.5)}
    assert isinstance(found[1][1]["n"], np.float32)
    assert found[2].shape == (0, 2)
    assert found[3:] == ["text", b"bytes", 7]


# What is refused


def test_an_absent_file_is_refused(path):
    assert "cannot be read (No such file or directory)" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"(dp0\n."])
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    assert "is neither an .npz nor a pickle; choose a file of statistics" in refusal(path)


def test_a_file_of_other_arrays_is_refused_by_their_names(path):
    save(path, latents=np.zeros(3), labels=np.zeros(3))
    assert "has neither 'mu' and 'sigma' nor 'arr_0', but 'latents', 'labels';" in refusal(path)


@pytest.mark.parametrize(("given", "lacks"), [("mu", "sigma"), ("sigma", "mu")])
def test_half_of_the_statistics_is_refused(path, given, lacks):
    save(path, **{given: np.eye(2)})
    assert f"has no {lacks!r} beside {given!r}" in refusal(path)


def good(pool):
    return {"mu": pool.mean, "sigma": pool.covariance}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"mu": np.zeros((1, 4))}, "'mu' and 'sigma' have the shapes (1, 4) and (4, 4)"),
        ({"mu": np.zeros(3)}, "'mu' and 'sigma' have the shapes (3,) and (4, 4)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "have the shapes (0,) and (0, 0)"),
        ({"mu": np.array([1, 2, np.nan, 4])}, "'mu' must hold finite real numbers"),
        ({"sigma": np.eye(4) * 1j}, "'sigma' must hold finite real numbers"),
        ({"sigma": np.eye(4) + np.eye(4, k=1) * 1e-3}, "'sigma' is not symmetric"),
        ({"sigma": -np.eye(4)}, "'sigma' is no covariance, for a variance is negative in some"),
        ({"sigma": np.diag([5.0, 5, 5, -1])}, "'sigma' is no covariance"),
        ({"sigma": np.ones((4, 4)) * 2 - np.eye(4)}, "'sigma' is no covariance"),
        ({"mu_s": np.zeros(4), "sigma_s": -np.eye(4)}, "'sigma_s' is no covariance"),
        ({"mu_s": np.zeros(3), "sigma_s": np.eye(4)}, "'mu_s' and 'sigma_s' have the shapes"),
        ({"pool": np.zeros((7, 4))}, "'pool' is float64 (7, 4), but must be float32 [n, 4]"),
        ({"pool": np.zeros((7, 5), np.float32)}, "'pool' is float32 (7, 5), but must be"),
        ({"pool": np.full((7, 4), np.nan, np.float32)}, "pool row 0 of 7 holds NaN or infinity"),
        (
            {"pool": np.full((7, 4), 0x7FA00000, np.uint32).view(np.float32)},  # a signalling NaN
            "pool row 0 of 7 holds NaN or infinity",
        ),
        ({"pool": np.zeros((3, 4), np.float32)}, "'pool' is float32 (3, 4), but must be"),
        ({"arr_0": np.zeros((3, 4, 4, 3), np.uint8)}, "'arr_0' is uint8 (3, 4, 4, 3), but must"),
        ({"arr_0": np.zeros((5, 4, 4, 3))}, "'arr_0' is float64 (5, 4, 4, 3), but must be uint8"),
        ({"arr_0": np.zeros((5, 3, 4, 4), np.uint8)}, "'arr_0' is uint8 (5, 3, 4, 4), but must"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(path, pool, changed, says):
    save(path, **(good(pool) | changed))
    assert says in refusal(path)


def test_statistics_of_more_features_than_any_have_are_refused_before_they_are_copied(path):
    many = reference_statistics.MOST_FEATURES + 1
    row = np.zeros(many, np.uint8)
    save(path, mu=row, sigma=np.zeros((many, 1), np.uint8))
    assert f"'mu' has the shape ({many},), but statistics are of at most 8192" in refusal(path)
    save(path, mu=np.zeros(4), sigma=np.zeros((1, 1, 4, 4)))
    assert "'sigma' has the shape (1, 1, 4, 4), but statistics" in refusal(path)


@pytest.mark.parametrize("space", [np.zeros(3), np.array(["a", "b"]), np.array(b"a1")])
def test_a_feature_space_that_is_no_text_is_refused(path, pool, space):
    save(path, **good(pool), space=space)
    assert "'space' is no text" in refusal(path)


def test_a_feature_space_of_broken_text_is_refused(path, pool):
    save(path, **good(pool), space=np.array("abc"))
    path.write_bytes(path.read_bytes().replace("abc".encode("utf-32-le"), b"\xff" * 12))
    assert "'space' is no text" in refusal(path)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a named pipe"),
        (lambda p: p.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(path, make, kind):
    make(path)
    assert f"is {kind}; name a regular file" in refusal(path)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_covariance_of_fewer_samples_than_dimensions_is_accepted(path, pool, rng, rank):
    rows = rng.normal(size=(rank, 4))
    sigma = (rows.T @ rows).astype(np.float32)
    save(path, **(good(pool) | {"sigma": sigma}))
    np.testing.assert_array_equal(reference_statistics.read(path, FIELD).pool.covariance, sigma)


def test_a_folder_of_pictures_is_refused_with_what_makes_statistics_of_them(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="evaluate.reference = .*: is a folder; .*--mode=reference"):
        reference_statistics.read(tmp_path, "evaluate.reference")


def test_a_covariance_rounded_to_float32_is_accepted(path, pool, rng):
    rounded = (pool.covariance * (1 + rng.uniform(-6e-8, 6e-8, size=(4, 4)))).astype(np.float32)
    assert (rounded != rounded.T).any()
    save(path, **(good(pool) | {"sigma": rounded}))
    np.testing.assert_array_equal(reference_statistics.read(path, FIELD).pool.covariance, rounded)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ([1, 2], "is a pickle without {'mu', 'sigma'}"),
        ({"mu": 1}, "has neither 'mu' and 'sigma' nor 'arr_0', but nothing"),
        ({"fid": 3}, "has neither 'mu' and 'sigma' nor 'arr_0', but nothing"),
    ],
)
def test_a_pickle_of_something_else_is_refused(path, saved, says):
    path.write_bytes(pickle.dumps(saved))
    assert says in refusal(path)


def test_a_pickle_with_lists_for_arrays_is_refused(path):
    path.write_bytes(pickle.dumps({"fid": {"mu": [1.0], "sigma": [[1.0]]}}))
    assert "has neither 'mu' and 'sigma' nor 'arr_0', but nothing" in refusal(path)


class Attack:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_would_run_something_is_refused(path, tmp_path, protocol):
    path.write_bytes(pickle.dumps({"fid": Attack(tmp_path / "ran")}, protocol))
    assert "mkdir', which is more than plain weights" in refusal(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.array([{}, 1]), "has an array of dtype 'O8'"),
        (np.zeros(2, [("a", "f4")]), "has an array of dtype 'V4'"),
        (np.array(["a"]), "has an array of dtype 'U1'"),
        (np.zeros(2, complex), "has an array of dtype 'c16'"),
    ],
)
def test_a_pickle_of_other_arrays_than_numbers_is_refused(path, protocol, array, says):
    path.write_bytes(pickle.dumps({"fid": {"mu": array}}, protocol))
    assert says in refusal(path)


@pytest.mark.parametrize("kept", [20, 100, -1])
def test_a_pickle_cut_short_is_refused(path, pool, protocol, kept):
    path.write_bytes(pickle.dumps({"fid": good(pool)}, protocol)[:kept])
    assert "its contents are damaged" in refusal(path)


EMPTY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8K\x00K\x01\x87R"


NUMBER = b"C\x08" + bytes(8)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (
            b"(K\x01K\x02\x85" + DTYPE + b"\x89" + NUMBER + b"tb.",
            "the shape (2,) needs 16 bytes, but 8 are there",
        ),
        (b"(K\x01K\x01\x85" + DTYPE + b"\x89J\0\0\0\x7ftb.", "a int where the bytes of an array"),
        (b"(K\x01K\x01\x85K\x07\x89" + NUMBER + b"tb.", "'int' object has no attribute 'dtype'"),
        (b"K\x05b.", "int"),
    ],
    ids=["one number for two places", "a length for the bytes", "no dtype", "no state"],
)
def test_an_array_with_a_broken_state_is_refused(path, program, says):
    path.write_bytes(EMPTY + program)
    message = refusal(path)
    assert "its contents are damaged" in message
    assert says in message


def test_lists_that_hold_each_other_over_and_over_are_refused_at_once(path):
    nested = []
    for _ in range(60):
        nested = [nested, nested]  # 2^60 lists, if each were walked as often as it is held
    path.write_bytes(pickle.dumps({"fid": nested}))
    assert "holds the same things over and over" in refusal(path)


@pytest.mark.parametrize(
    "program", [b"]" * 5_000 + b"a" * 4_999, b"]\x94h\x00a", b"}\x94K\x01h\x00s"]
)
def test_pickles_nested_beyond_what_python_can_walk_are_refused(path, program):
    path.write_bytes(b"\x80\x04" + program + b".")
    assert "is nested more than 64 levels deep, or holds itself" in refusal(path)


# Pickles that ask for more memory or time than their size allows

SET, ENCODE = b"cbuiltins\nset\n", b"c_codecs\nencode\n"


@pytest.fixture
def strict(monkeypatch):
    """Little to start with, so that small pickles show what large ones would cost."""
    monkeypatch.setattr(unpickler, "START", 2**12)


@pytest.mark.parametrize(
    "program",
    [
        # A list of 500 numbers (place 1), and 100 sets of it.
        SET + b"\x94](" + b"".join(b"M" + i.to_bytes(2, "little") for i in range(500)) + b"e\x94"
        b"](" + b"h\x00h\x01\x85R" * 100 + b"e.",
        # A text of 100,000 letters, and 100 times its bytes.
        ENCODE + b"\x94X\xa0\x86\x01\x00" + b"a" * 100_000 + b"\x94X\x06\0\0\0latin1\x94"
        b"](" + b"h\x00h\x01h\x02\x86R" * 100 + b"e.",
        # A dict of 200 entries, and 200 Records of it.
        b"cargparse\nNamespace\n\x94}("
        + b"".join(b"\x8c\x04%04dN" % i for i in range(200))
        + b"u\x94]("
        + b"h\x00)Rh\x01b" * 200
        + b"e.",
        # Empty sets, the largest thing of one byte.
        b"](" + b"\x8f" * 1000 + b"e.",
    ],
    ids=["sets", "texts", "records", "empty sets"],
)
def test_a_pickle_that_asks_for_memory_beyond_its_size_is_refused(path, strict, program):
    path.write_bytes(b"\x80\x04" + program)
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "asks for memory out of proportion to its size" in message
    assert peak < 2**18 + 2 * unpickler.PER_BYTE * len(program)


@pytest.mark.parametrize(
    "value",
    [
        {i: {} for i in range(500)},
        [[i, (i, -i)] for i in range(500)],
        {f"layers.{i}.attn.qkv.weight": {"shape": (3, 4), "step": 1e-4} for i in range(200)},
        [{"exp_avg": i, "exp_avg_sq": i, "step": i} for i in range(200)],
        [set(range(i)) for i in range(20)],
        "a" * 10**5,
        [np.arange(10_000) for _ in range(10)],
    ],
    ids=["dicts", "tuples", "names", "shared names", "sets", "a text", "arrays"],
)
def test_a_pickle_of_many_small_things_is_read(path, strict, value, protocol):
    path.write_bytes(pickle.dumps(value, protocol))
    np.testing.assert_equal(numpy_pickle.load(path), value)


def test_keys_that_could_be_chosen_to_collide_are_refused(path):
    path.write_bytes(pickle.dumps({k * (2**61 - 1): k for k in range(100)}))
    assert "as a dictionary key" in refusal(path)


def test_a_dtype_that_is_no_text_is_not_shown(path):
    nested = b"](" + b"h\x00" * 5
    path.write_bytes(b"\x80\x04cnumpy\ndtype\n(" + nested + b"e\x89\x88tR.")
    assert "\n" not in refusal(path)
