"""PyTorch's files from before version 1.6, written here by hand, are read, and nothing is run."""

import pickle
import tarfile
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from torch_legacy_pickles import MAGIC, OLD_TENSOR, SYSTEM, Part, Rebuilt, stored, write
from torch_pickles import (
    ATTACKS,
    STORAGE_OF,
    TENSOR,
    Parameter,
    Storage,
    Tensor,
    refusal,
    tensor,
    text,
    training_file,
)

from ig_jax.io.torch import file as torch_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


# What is read


@pytest.mark.parametrize("dtype", STORAGE_OF, ids=str)
def test_values_and_dtype_are_those_saved(path, dtype):
    array = np.array([[0, 1, 2], [3, 100, 1]]).astype(dtype)
    read = torch_file.load(write(path, {"x": tensor(array), "y": tensor(array[::-1].copy())}))
    assert read["x"].dtype == read["y"].dtype == dtype
    np.testing.assert_array_equal(read["x"], array)
    np.testing.assert_array_equal(read["y"], array[::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64], ids=str)
def test_elements_may_lie_at_any_byte(path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    alignments = set()
    for letters in range(1, 9):  # each letter moves what follows on by one byte
        (read,) = torch_file.load(write(path, {"x" * letters: tensor(array)})).values()
        np.testing.assert_array_equal(read.astype(np.float64), array.astype(np.float64))
        np.testing.assert_array_equal(read.T.copy(), array.T)
        # Converted by numpy: on processors without F16C, XLA cannot.
        on_device = np.asarray(jnp.asarray(read)).astype(np.float32)
        np.testing.assert_array_equal(on_device, array)
        alignments.add(read.flags.aligned)
    assert alignments == {True, False}


def test_every_array_is_read_only(path):
    saved = {"full": tensor(np.ones(3)), "empty": tensor(np.ones((0, 2))), "one": tensor(1.0)}
    for array in torch_file.load(write(path, saved)).values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_storages_of_several_dtypes_and_lengths_are_told_apart(path):
    saved = {
        "bytes": tensor(np.arange(5, dtype=np.uint8)),
        "none": tensor(np.zeros((0, 4), np.float64)),
        "scalar": tensor(np.int64(-7)),
        "half": tensor(np.array([1.5, -2], np.float16)),
        "float": tensor(np.array([[0.25], [4]], np.float32)),
    }
    read = torch_file.load(write(path, saved))
    assert {name: (a.dtype.name, a.tolist()) for name, a in read.items()} == {
        "bytes": ("uint8", [0, 1, 2, 3, 4]),
        "none": ("float64", []),
        "scalar": ("int64", -7),
        "half": ("float16", [1.5, -2]),
        "float": ("float32", [[0.25], [4]]),
    }
    assert read["none"].shape == (0, 4) and read["scalar"].shape == ()


def test_two_tensors_over_one_storage_share_its_memory(path):
    storage = Storage(np.arange(6, dtype=np.float32))
    first, second = Tensor(storage, 0, (4,), (1,)), Tensor(storage, 2, (4,), (1,))
    a, b = torch_file.load(write(path, [first, second]))
    np.testing.assert_array_equal(a, [0, 1, 2, 3])
    np.testing.assert_array_equal(b, [2, 3, 4, 5])
    assert np.shares_memory(a, b)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "expected"),
    [
        (0, (3, 2), (1, 3), [[0, 3], [1, 4], [2, 5]]),  # transposed
        (1, (2, 2), (3, 1), [[1, 2], [4, 5]]),  # cut out
        (7, (), (), 7),
        (4, (2, 3), (1, 0), [[4, 4, 4], [5, 5, 5]]),  # expanded
    ],
)
def test_element_i_j_is_at_offset_plus_i_j_times_stride(path, offset, size, stride, expected):
    saved = Tensor(Storage(np.arange(12, dtype=np.int64)), offset, size, stride)
    read = torch_file.load(write(path, saved))
    np.testing.assert_array_equal(read, np.array(expected), strict=True)


def test_a_part_of_a_storage_has_its_own_first_element(path):
    whole = Storage(np.arange(10, dtype=np.float32))
    parts = [Tensor(Part(whole, 3, 4), 1, (3,), (1,)), Tensor(Part(whole, 0, 10), 9, (), ())]
    whole_read, first, last = torch_file.load(write(path, [Tensor(whole, 0, (10,), (1,)), *parts]))
    np.testing.assert_array_equal(first, [4, 5, 6])
    assert last == 9 and np.shares_memory(whole_read, first)


@pytest.mark.parametrize(
    ("function", "rest"), [(OLD_TENSOR, ()), (TENSOR, (False, None))], ids=["0.3", "0.4"]
)
def test_a_tensor_is_read_as_old_versions_wrote_it(path, function, rest):
    where = (Storage(np.arange(6, dtype=np.float32)), 1, (2, 2), (2, 1))
    read = torch_file.load(write(path, {"w": Rebuilt(function, (*where, *rest))}))["w"]
    np.testing.assert_array_equal(read, np.array([[1, 2], [3, 4]], np.float32), strict=True)


def test_a_parameter_is_its_tensor(path):
    read = torch_file.load(write(path, Parameter(tensor(np.arange(3)))))
    np.testing.assert_array_equal(read, [0, 1, 2])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_training_file_is_read_whole(path, protocol):
    saved = training_file()
    del saved["raw"]  # protocol 2 has no bytes of its own
    loaded = torch_file.load(write(path, saved, protocol))
    assert list(loaded) == list(saved)
    assert type(loaded["ema"]) is dict and list(loaded["ema"]) == ["w"]
    np.testing.assert_array_equal(loaded["ema"]["w"], np.full((2, 3), 2.0))
    np.testing.assert_array_equal(loaded["model"]["w"], np.full((2, 3), 1.0))
    assert loaded["opt"]["param_groups"] == saved["opt"]["param_groups"]
    assert loaded["opt"]["state"][0]["step"] == 7 and loaded["opt"]["state"][1] == {}
    assert dict(loaded["args"]) == vars(saved["args"])
    assert (loaded["epoch"], loaded["steps"], loaded["shape"]) == (4, 2**40, (2, 3))


def test_what_follows_the_storages_is_not_read(path):
    write(path, tensor(np.arange(3)))
    path.write_bytes(path.read_bytes() + b"more")
    np.testing.assert_array_equal(torch_file.load(path), [0, 1, 2])


def test_loading_a_large_file_takes_memory_for_none_of_its_values(path):
    numel = 50 << 20
    large = Storage(np.zeros(0, np.float32), numel)
    write(path, Tensor(large, 0, (numel,), (1,)), count=numel)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 4 * numel)  # zeros that take no room on the disk
    tracemalloc.start()
    read = torch_file.load(path)
    assert read.shape == (numel,) and read[-1] == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# Files that are refused


def test_a_file_cut_anywhere_is_refused(path):
    saved = {"x": tensor(np.ones(3)), "y": tensor(np.ones(2, np.float16))}
    whole = write(path, saved).read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)


def test_the_tar_of_the_first_versions_is_refused_with_the_mend(path):
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    message = refusal(path)
    assert "neither a zip nor a pickle" in message and "torch.save(torch.load(f), f)" in message


@pytest.mark.parametrize(
    ("part", "program", "says"),
    [
        ("magic", pickle.dumps(MAGIC + 1, 2), "a pickle, but not one of torch.save"),
        ("version", pickle.dumps(1002, 2), "of another version of PyTorch's format than 1001"),
        ("system", pickle.dumps({**SYSTEM, "little_endian": False}, 2), "on a big-endian machine"),
        ("system", pickle.dumps({}, 2), "damaged"),
        ("system", pickle.dumps(None, 2), "damaged"),
        ("system", b"\x80\x02K\x01Q.", "something other than a storage"),
        ("keys", pickle.dumps([], 2), "lacks its storage '0'"),
        ("keys", pickle.dumps(["1", "0"], 2), "lists a storage that nothing in it refers to"),
        ("keys", pickle.dumps([0], 2), "lists a storage that nothing in it refers to"),
        ("keys", pickle.dumps([[]], 2), "lists a storage that nothing in it refers to"),
        ("keys", pickle.dumps(None, 2), "damaged"),
        ("storages", b"", "damaged"),
        ("storages", stored(np.zeros(11, np.float32)), "has 11 elements, but is referred to as"),
        ("storages", stored(np.zeros(13, np.float32)), "has 13 elements, but is referred to as"),
        ("storages", stored(np.zeros(12, np.float32), 11), "has 11 elements, but"),
        ("storages", stored(np.zeros(12, np.float32), -1), "has -1 elements, but"),
        ("storages", stored(np.zeros(11, np.float32), 12), "has 44 bytes, but 12 elements of"),
    ],
)
def test_a_broken_part_is_refused(path, part, program, says):
    write(path, tensor(np.zeros(12, np.float32)), **{part: program})
    assert says in refusal(path)


@pytest.mark.parametrize("numel", [-1, 2**62, 2**80])
def test_a_storage_that_claims_what_the_file_cannot_hold_is_refused(path, numel):
    saved = Tensor(Storage(np.zeros(12, np.float32), numel), 0, (1,), (1,))
    count = numel if numel < 2**63 else None
    assert f"{numel}" in refusal(write(path, saved, count=count))


@pytest.mark.parametrize(
    ("offset", "numel"), [(0, 13), (9, 4), (-1, 4), (4, -1), (0.0, 2), (None, 2), (2**70, 1)]
)
def test_a_part_that_leaves_its_storage_is_refused(path, offset, numel):
    whole = Storage(np.zeros(12, np.float32))
    saved = Tensor(Part(whole, offset, numel), 0, (1,), (1,))
    assert "a part of its storage '0' that leaves it" in refusal(write(path, saved))


def test_a_tensor_that_leaves_its_part_of_a_storage_is_refused(path):
    whole = Storage(np.zeros(12, np.float32))
    saved = Tensor(Part(whole, 2, 4), 1, (4,), (1,))
    assert "leaves its storage of 4 elements" in refusal(write(path, saved))


def reference(kind=b"ctorch\nFloatStorage\n", key=b"", device=b"", numel=b"K\x0c", part=b"N"):
    key, device = key or text("0"), device or text("cpu")
    return b"(" + text("storage") + kind + key + device + numel + part + b"tQ"


@pytest.mark.parametrize(
    ("referred", "says"),
    [
        (reference(kind=b"ctorch\nComplexFloatStorage\n"), "holds 'torch.ComplexFloatStorage'"),
        (reference(kind=b"ctorch._utils\n_rebuild_tensor\n"), "holds 'torch._utils._rebuild_ten"),
        (reference(kind=text("torch.FloatStorage")), "something other than a storage"),
        (reference(key=b"K\x00"), "something other than a storage"),
        (reference(numel=b"N"), "something other than a storage"),
        (reference(part=b""), "something other than a storage"),
        (reference(part=b"K\x01"), "a part of its storage"),
        (reference() + reference(kind=b"ctorch\nIntStorage\n"), "as two different ones"),
        (reference() + reference(numel=b"K\x0b"), "as two different ones"),
        (reference(key=text("1")), "lists a storage that nothing in it refers to"),
        (reference() + reference(key=text("1")), "lacks its storage '1'"),
        (reference() + b"ctorch._utils\n_rebuild_tensor\n)R", "damaged"),
    ],
)
def test_a_reference_to_no_storage_is_refused(path, referred, says):
    program = b"\x80\x02](" + referred + b"e."
    assert says in refusal(write(path, tensor(np.zeros(12, np.float32)), object=program))


@pytest.mark.parametrize("part", ["magic", "version", "system", "object", "keys"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_would_run_something_is_refused_by_name_and_runs_nothing(path, tmp_path, attack, part):
    sentinel = tmp_path / "ran"
    dotted, program = ATTACKS[attack](sentinel)
    write(path, tensor(np.ones(3)), **{part: b"\x80\x02" + program.removeprefix(b"\x80\x02")})
    assert repr(dotted) in refusal(path)
    assert not sentinel.exists()
