"""PyTorch's files, written here by hand: what they hold is read, and nothing in them is run."""

import argparse
import io
import mmap
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_pickles import (
    ATTACKS,
    STORAGE_OF,
    Parameter,
    Storage,
    Tensor,
    pickled,
    refusal,
    tensor,
    text,
    training_file,
    write,
    write_program,
    write_zip,
)

from ig_jax.io.torch import file as torch_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


# What is read


@pytest.mark.parametrize("dtype", STORAGE_OF, ids=str)
def test_values_and_dtype_are_those_saved(path, dtype):
    array = np.array([[0, 1, 2], [3, 100, 1]]).astype(dtype)
    read = torch_file.load(write(path, {"x": tensor(array)}))["x"]
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)


def test_bfloat16_bits_are_read_as_the_upper_half_of_a_float32(path):
    bits = np.array([0x3F80, 0xC049], np.uint16)  # 1.0 and -3.140625
    saved = tensor(bits.view(ml_dtypes.bfloat16))
    read = torch_file.load(write(path, saved))
    np.testing.assert_array_equal(read.astype(np.float32), [1.0, -3.140625])


def test_every_array_is_read_only(path):
    saved = {"full": tensor(np.ones(3)), "empty": tensor(np.ones((0, 2))), "one": tensor(1.0)}
    for array in torch_file.load(write(path, saved)).values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


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
        (5, (2,), (4,), [5, 9]),  # every fourth
        (7, (), (), 7),
        (4, (2, 3), (1, 0), [[4, 4, 4], [5, 5, 5]]),  # expanded
        (0, (12,), (1,), range(12)),
        (11, (1, 1), (99, 99), [[11]]),  # the stride of an axis of size 1 is never taken
    ],
)
def test_element_i_j_is_at_offset_plus_i_j_times_stride(path, offset, size, stride, expected):
    saved = Tensor(Storage(np.arange(12, dtype=np.int64)), offset, size, stride)
    read = torch_file.load(write(path, saved))
    np.testing.assert_array_equal(read, np.array(expected), strict=True)


@pytest.mark.parametrize("size", [(0,), (2, 0, 3)])
@pytest.mark.parametrize("held", [0, 5])
def test_an_empty_tensor_keeps_its_shape(path, size, held):
    saved = Tensor(Storage(np.zeros(held, np.float32)), held, size, (10**6,) * len(size))
    read = torch_file.load(write(path, saved))
    assert read.shape == size and read.dtype == np.float32


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_training_file_is_read_whole(path, protocol):
    saved = training_file()
    if protocol == 2:
        del saved["raw"]  # protocol 2 has no bytes of its own
    loaded = torch_file.load(write(path, saved, protocol=protocol))
    assert list(loaded) == list(saved)
    assert type(loaded["ema"]) is dict and list(loaded["ema"]) == ["w"]
    np.testing.assert_array_equal(loaded["ema"]["w"], np.full((2, 3), 2.0))
    assert loaded["opt"]["param_groups"] == saved["opt"]["param_groups"]
    assert loaded["opt"]["state"][0]["step"] == 7 and loaded["opt"]["state"][1] == {}
    assert dict(loaded["args"]) == vars(saved["args"])
    assert (loaded["epoch"], loaded["steps"], loaded["shape"]) == (4, 2**40, (2, 3))
    assert loaded.get("raw") == saved.get("raw")


def test_a_namespace_becomes_a_record_that_cannot_be_written(path):
    record = torch_file.load(write(path, argparse.Namespace(lr=0.1)))
    assert not isinstance(record, argparse.Namespace) and record["lr"] == 0.1 and len(record) == 1
    with pytest.raises(TypeError):
        record["lr"] = 0.2


def test_a_parameter_is_its_tensor(path):
    read = torch_file.load(write(path, Parameter(tensor(np.arange(3)))))
    np.testing.assert_array_equal(read, [0, 1, 2])


def add_hole(archive, name, size):
    """A stored member of zeros that takes no room on the disk."""
    info = zipfile.ZipInfo(name)
    info.file_size = info.compress_size = size
    info.CRC = 0
    info.header_offset = archive.fp.tell()
    archive.fp.write(info.FileHeader())
    archive.start_dir = archive.fp.seek(size, io.SEEK_CUR)
    archive.filelist.append(info)
    archive.NameToInfo[name] = info


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap)


def test_loading_a_large_file_takes_memory_for_none_of_its_values(path):
    small, large = (
        tensor(np.arange(3, dtype=np.float32)),
        Storage(np.zeros(0, np.float32), 50 << 20),
    )
    program, _ = pickled({"large": Tensor(large, 0, (50 << 20,), (1,)), "small": small})
    with zipfile.ZipFile(path, "w") as archive:
        add_hole(archive, "archive/data/0", 200 << 20)
        archive.writestr("archive/data/1", small.storage.elements.tobytes())
        archive.writestr("archive/data.pkl", program)
    tracemalloc.start()
    loaded = torch_file.load(path)
    np.testing.assert_array_equal(loaded["small"], [0, 1, 2])
    assert loaded["large"][-1] == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert all(is_mapped(array) for array in loaded.values())


# Files that are refused


def test_a_missing_file_is_refused(path):
    assert "No such file" in refusal(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "neither a zip nor a pickle"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "neither a zip nor a pickle"),
        (b"PK\x03\x04" + bytes(60), "damaged"),
        (pickle.dumps({"w": 1.0}, 2), "a pickle, but not one of torch.save"),
    ],
)
def test_another_format_is_refused_with_the_mend(path, content, says):
    path.write_bytes(content)
    message = refusal(path)
    assert says in message and ("torch.save(torch.load(f), f)" in message or "copy" in message)


def test_a_file_cut_anywhere_is_refused(path):
    whole = write(path, {"x": tensor(np.ones(3))}).read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)


def test_compressed_members_are_refused(path):
    write(path, {"x": tensor(np.ones(3))}, method=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_a_big_endian_file_is_refused(path):
    assert "big-endian" in refusal(write(path, {}, byteorder=b"big"))


def test_a_zip_of_something_else_is_refused(path):
    assert "not one of torch.save" in refusal(write_zip(path, {"model.onnx": b""}))


def test_a_missing_storage_is_refused(path):
    program, _ = pickled(tensor(np.ones(3)))
    assert "lacks its member 'archive/data/0'" in refusal(write_zip(path, {"data.pkl": program}))


@pytest.mark.parametrize("claimed", [-1, 0, 11, 13, 2**70])
def test_a_storage_of_another_length_than_claimed_is_refused(path, claimed):
    storage = Storage(np.zeros(12, np.float32), claimed)
    assert "has 48 bytes" in refusal(write(path, Tensor(storage, 0, (1,), (1,))))


OUTSIDE, BROKEN = "leaves its storage of 12 elements", "negative or broken offset or size"


@pytest.mark.parametrize(
    ("offset", "size", "stride", "says"),
    [
        (0, (13,), (1,), OUTSIDE),
        (1, (12,), (1,), OUTSIDE),
        (12, (), (), OUTSIDE),
        (13, (0,), (1,), OUTSIDE),
        (0, (3, 5), (5, 1), OUTSIDE),
        (0, (2,), (12,), OUTSIDE),
        (2**62, (4,), (1,), OUTSIDE),
        (0, (2**62, 2**62), (1, 1), OUTSIDE),
        (0, (2,), (2**63,), OUTSIDE),
        (-1, (2,), (1,), BROKEN),
        (3, (2,), (-1,), BROKEN),
        (0, (-2,), (1,), BROKEN),
        (0, (-2, -2), (1, 1), BROKEN),
        (0, (2.0,), (1,), BROKEN),
        (0, (2,), (1.0,), BROKEN),
        (True, (2,), (1,), BROKEN),
        (None, (2,), (1,), BROKEN),
        (0, ("2",), (1,), BROKEN),
        (0, 2, 1, "without a storage, size or stride"),
        (0, (2, 2), (1,), "of 2 axes and 1 strides"),
        (0, (1,) * 100, (1,) * 100, "of 100 axes"),
        (0, (13,), (0,), "of size (13,) expanded from 12 elements; save it with .contiguous()"),
        (0, (2**40, 2**40), (0, 0), "expanded from 12 elements"),
        (0, (7, 6), (1, 1), "expanded from 12 elements"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(path, offset, size, stride, says):
    saved = Tensor(Storage(np.zeros(12, np.float32)), offset, size, stride)
    assert says in refusal(write(path, saved))


def test_tensors_that_share_a_storage_over_and_over_are_refused(path):
    storage = Storage(np.zeros(10_000, np.float32))
    tied = [Tensor(storage, 0, (100, 100), (100, 1)) for _ in range(7)]
    assert len(torch_file.load(write(path, tied))) == 7
    assert "tensors of 400,000 bytes that share storages" in refusal(write(path, tied[:1] * 10))
    assert "save each on its own with .clone()" in refusal(write(path, tied + tied))


@pytest.mark.parametrize(
    ("make", "kind"), [(os.mkdir, "a folder"), (os.mkfifo, "a named pipe")], ids=["folder", "pipe"]
)
def test_what_is_no_regular_file_is_refused_at_once(path, make, kind):
    make(path)
    assert refusal(path) == f"is {kind}; name a regular file"


def test_a_storage_outside_of_the_file_is_refused(path):
    write(path, {"x": tensor(np.ones(3))})
    content = path.read_bytes()
    place = content.index(b"archive/data/0", content.index(b"PK\x01\x02")) - 4  # of its offset
    for offset in (0, 1, 100, len(content) - 10, 2**32 - 2):
        path.write_bytes(content[:place] + struct.pack("<I", offset) + content[place + 4 :])
        assert "'archive/data/0' should begin" in refusal(path)


def test_a_tensor_with_a_pending_sign_is_refused(path):
    saved = Tensor(Storage(np.ones(2, np.float32)), 0, (2,), (1,), rest=({"neg": True},))
    assert "pending" in refusal(write(path, saved))


# Files that would run something


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pickle_that_would_run_something_is_refused_by_name_and_runs_nothing(
    path, tmp_path, attack
):
    sentinel = tmp_path / "ran"
    dotted, program = ATTACKS[attack](sentinel)
    pickle.loads(program)
    assert sentinel.exists()  # it does run where nothing stops it
    sentinel.unlink()
    assert repr(dotted) in refusal(write_program(path, program))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "dotted",
    [
        "collections OrderedDict.__init__.__globals__",
        "argparse Namespace.__init__",
        "argparse Namespace.__class__",
        "torch._utils _rebuild_tensor_v2.__globals__",
        "builtins getattr",
        "builtins object",
        "torch.storage _load_from_bytes",
        "torch load",
        "numpy.core.multiarray _reconstruct",
        "ig_jax.io.torch.unpickler Record",
        "collections defaultdict",
    ],
)
@pytest.mark.parametrize("by_stack", [False, True])
def test_a_name_beyond_the_list_is_refused_even_if_never_called(path, dotted, by_stack):
    module, name = dotted.split(" ")
    by_global = f"c{module}\n{name}\n".encode()
    program = text(module) + text(name) + b"\x93" if by_stack else by_global
    assert repr(f"{module}.{name}") in refusal(write_program(path, b"\x80\x04" + program + b"."))


ORDERED, NAMESPACE = b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n"


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (NAMESPACE + b")\x81}" + text("__class__") + b"K\x01sb.", "sets the attribute '__class__'"),
        (ORDERED + b")R}" + text("__dict__") + b"K\x01sb.", "sets the attribute '__dict__'"),
        (NAMESPACE + b")\x81}K\x01K\x01sb.", "sets the attribute 1"),
        (NAMESPACE + b")\x81N}" + text("lr") + b"K\x01s\x86b.", "a tuple where a dict belongs"),
        (NAMESPACE + b"}" + text("lr") + b"K\x01sb.", "a Name where a dict belongs"),
        (ORDERED + b"}" + text("fromkeys") + b"K\x01sb.", "a Name where a dict belongs"),
        (NAMESPACE + b")\x81" + text("lr") + b"K\x01s.", "a Namespace where a dict belongs"),
        (ORDERED + text("a") + b"R.", "a str where a tuple belongs"),
        (text("os.system") + b")R.", "a str where a Name belongs"),
        (b"ctorch\nFloatStorage\n)R.", "holds 'torch.FloatStorage'"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
        (b"ctorch\nSize\nK\x05\x85R.", "torch.Size of something other"),
        (b"}(K\x01K\x02K\x03u.", "damaged"),
        (b"}K\x01a.", "a dict where a list belongs"),
        (b"](K\x01\x90.", "a list where a set belongs"),
        (b"\x8f()\x90.", "a tuple as a dictionary key or in a set"),
        (b"c__builtin__\nset\n])a\x85R.", "a tuple as a dictionary key or in a set"),
        (b"ctorch._utils\n_rebuild_parameter\nK\x01NN\x87R.", "a parameter without a tensor"),
        (b"})K\x01s.", "a tuple as a dictionary key"),
        (b"K\x05Q.", "something other than a storage"),
        (b"\x82\x01.", "the pickle instruction EXT1"),
        (b")0.", "the pickle instruction POP"),
        (b"h\x07.", "damaged"),
        (b"c\\q\n\\x2\n.", "holds '\\\\q.\\\\x2'"),
        (b"cos\nsystem", "damaged"),
        (b"c\xff\n\n.", "damaged"),
        (b"S'\\q'\n.", "the pickle instruction STRING"),
        (b".", "damaged"),
        (b"R.", "damaged"),
        (b"u.", "damaged"),
        (b"NN.", "damaged"),
        (b"", "damaged"),
        (b"\xff", "damaged"),
    ],
)
def test_an_instruction_beyond_plain_data_is_refused(path, program, says):
    assert says in refusal(write_program(path, program))


def test_deeply_nested_values_are_refused_where_they_could_exhaust_the_stack(path):
    hashed = b"})" + b"\x85" * 2_000 + b"Ns."
    assert "as a dictionary key" in refusal(write_program(path, hashed))
    nested = b")" + b"\x85" * 2_000
    make = b"ctorch._utils\n_rebuild_tensor_v2\n("
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
    )
    program = make + storage + b"K\x00" + nested + nested + b"\x89NtR."
    assert "broken offset or size" in refusal(write_program(path, program))
