"""npz.py against numpy's own reading and writing, and against a reader by the rules of ADM's."""

import io
import mmap
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from adm import adm_blocks

from ig_jax.errors import UserError
from ig_jax.io import npz

PICTURES = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.npz"


def refusal(path, name="arr_0"):
    with pytest.raises(UserError) as caught:
        npz.read_array(path, name)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap)


# Reading


@pytest.mark.parametrize(
    "array",
    [
        PICTURES,
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.float32(3.5),
        np.array("sha256:0f"),
        np.zeros((0, 3)),
        np.arange(7, dtype=">i4"),
        np.arange(2**16 + 5, dtype=np.uint16)[:, None],
    ],
    ids=["pictures", "columns first", "a number", "text", "empty", "big-endian", "many rows"],
)
def test_an_array_that_numpy_stored_is_mapped_read_only(path, array):
    np.savez(path, first=np.zeros(3), wanted=array, last=np.ones(2))
    found = npz.read_array(path, "wanted")
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.asarray(array).dtype
    assert is_mapped(found)
    assert not found.flags.writeable
    assert npz.names(path) == ["first", "wanted", "last"]


def test_a_compressed_array_is_read_whole(path):
    np.savez_compressed(path, PICTURES)
    found = npz.read_array(path, "arr_0")
    np.testing.assert_array_equal(found, PICTURES)
    assert not is_mapped(found)


def test_a_long_header_is_read(path, tmp_path):
    # Version 2.0 of .npy has four bytes for the length of its header.
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, PICTURES, version=(2, 0))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "a.npy", "arr_0.npy")
    np.testing.assert_array_equal(npz.read_array(path, "arr_0"), PICTURES)


def test_the_arrays_that_are_there_are_named(path):
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    assert refusal(path).endswith("has no array 'arr_0'; it holds 'mu', 'sigma'")
    np.savez(path)
    assert refusal(path).endswith("it holds nothing")


def test_an_absent_file_is_refused(path):
    assert "cannot be read (No such file or directory)" in refusal(path)
    with pytest.raises(UserError, match="No such file"):
        npz.names(path)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_file_cut_short_is_refused(path, kept):
    np.savez(path, PICTURES)
    path.write_bytes(path.read_bytes()[:kept])
    assert ("is no .npz, or damaged" if kept else "is cut off, an empty file") in refusal(path)
    assert "it again" in refusal(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_member_is_refused(path, compressed):
    (np.savez_compressed if compressed else np.savez)(path, PICTURES)
    content = bytearray(path.read_bytes())
    place = content.index(b"arr_0.npy") + len("arr_0.npy") + 20  # behind the zip's own header
    content[place : place + 60] = bytes(60)
    path.write_bytes(content)
    assert "is no .npz, or damaged" in refusal(path)


def test_a_member_out_of_place_is_refused(path):
    np.savez(path, PICTURES)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK\x03\x04", b"PK\x03\x05"))
    assert "no member where 'arr_0.npy' should begin" in refusal(path)


def test_a_member_of_another_length_than_its_header_says_is_refused(path):
    np.savez(path, PICTURES)
    path.write_bytes(path.read_bytes().replace(b"(5, 4, 4, 3)", b"(6, 4, 4, 3)"))
    assert "'arr_0': the shape (6, 4, 4, 3) needs 288 bytes, but 240 are there" in refusal(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_python_objects_are_refused(path, save):
    save(path, np.array([{}, None]))
    assert "'arr_0': it holds Python objects" in refusal(path)


def test_an_encrypted_member_is_refused(path):
    np.savez(path, PICTURES)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(path)


def write_member(path, content, method):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("arr_0.npy", content)


def claiming(array, shape):
    """An .npy file of `array` whose header has another shape, of as many letters."""
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue().replace(str(array.shape).encode(), shape.encode())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("dtype", "shape", "says"),
    [
        (np.float64, "(10000000000000000,)", "needs 80000000000000000 bytes, but 8192 are there"),
        (np.float64, "(1,2000,1000,1000,1)", "needs 16000000000 bytes, but 8192 are there"),
        (np.uint8, "(10000000000,0,8,3,)", "rows without elements"),
    ],
)
def test_a_header_that_claims_more_than_there_is_takes_no_memory(path, method, dtype, shape, says):
    claimed = np.zeros((1,) * 6 + (1024,), dtype)  # '(1, 1, 1, 1, 1, 1, 1024)'
    write_member(path, claiming(claimed, shape.ljust(24)), method)
    tracemalloc.start()
    assert says in refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_member_that_unpacks_to_more_than_it_declares_is_refused_without_unpacking(path):
    write_member(path, b"\x93NUMPY" + bytes(50 << 20), zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    size = struct.pack("<I", (50 << 20) + 6)
    path.write_bytes(content.replace(size, struct.pack("<I", 1000)))
    tracemalloc.start()
    assert "'arr_0.npy' unpacks to something else than it should" in refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_member_that_cannot_unpack_to_what_it_declares_is_refused_at_once(path):
    write_member(path, bytes(2**20), zipfile.ZIP_DEFLATED)
    declared = struct.pack("<I", 2**20)
    path.write_bytes(path.read_bytes().replace(declared, struct.pack("<I", 2**31)))
    assert "of the member 'arr_0.npy' cannot unpack to 2,147,483,648" in refusal(path)


def test_a_member_with_one_wrong_byte_is_refused_by_its_checksum(path):
    write_member(path, claiming(PICTURES, str(PICTURES.shape)), zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        checksum = struct.pack("<I", archive.getinfo("arr_0.npy").CRC)
    path.write_bytes(content.replace(checksum, b"\1\2\3\4"))
    assert "unpacks to something else than it should" in refusal(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_of_compressing_are_refused_by_name(path, method):
    write_member(path, bytes(10), method)
    assert "'arr_0' compressed as numpy does not; re-save it with numpy.savez" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(path):
    np.savez(path, PICTURES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("arr_0.npy", b"another")
    assert "has two members 'arr_0.npy'" in refusal(path)


def test_a_pipe_is_refused_at_once(path):
    os.mkfifo(path)
    assert "is a named pipe; name a regular file" in refusal(path)


# Writing


@pytest.fixture
def written(path, tmp_path):
    np.save(tmp_path / "pictures.npy", PICTURES)
    npz.write(path, {"arr_0": tmp_path / "pictures.npy", "arr_1": np.arange(5)})
    return path


def test_numpy_reads_what_is_written(written, tmp_path):
    with np.load(written) as found:
        assert found.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(found["arr_0"], PICTURES)
        np.testing.assert_array_equal(found["arr_1"], np.arange(5))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.npz", "pictures.npy"]


def test_what_is_written_is_mapped_again(written):
    assert is_mapped(npz.read_array(written, "arr_0"))
    np.testing.assert_array_equal(npz.read_array(written, "arr_0"), PICTURES)


def test_equal_members_give_equal_bytes(written, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 2e9)
    again = tmp_path / "again.npz"
    npz.write(again, {"arr_0": PICTURES, "arr_1": np.arange(5)})
    assert again.read_bytes() == written.read_bytes()


def test_a_write_that_fails_leaves_the_old_file(written, tmp_path):
    before = written.read_bytes()
    with pytest.raises(FileNotFoundError):
        npz.write(written, {"arr_0": PICTURES, "arr_1": tmp_path / "absent.npy"})
    assert written.read_bytes() == before


def test_the_evaluator_of_adm_reads_what_is_written(written):
    blocks = list(adm_blocks(written, size=2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), PICTURES)


def test_a_picture_array_of_more_rows_than_two_bytes_count(path):
    pictures = np.random.default_rng(0).integers(0, 256, (2**16 + 3, 1, 1, 3), dtype=np.uint8)
    npz.write(path, {"arr_0": pictures})
    np.testing.assert_array_equal(npz.read_array(path, "arr_0"), pictures)
    np.testing.assert_array_equal(np.concatenate(list(adm_blocks(path, 50_000))), pictures)
