"""Arrays filled row by row: whole rows, in any order, by several writers, over several runs."""

import errno
import os

import numpy as np
import pytest

from ig_jax.errors import UserError
from ig_jax.io.row_store import Row, RowStore

ARRAYS = {"pool": Row((3,), np.float32), "near": Row((), np.float64), "image": Row((2, 2), "u1")}


def values(indices):
    """What the rows should hold: made of their index alone."""
    indices = np.asarray(indices)
    return {
        "pool": indices[:, None] + np.arange(3, dtype=np.float32) / 4,
        "near": indices / 7,
        "image": np.broadcast_to(indices[:, None, None] % 256, (len(indices), 2, 2)),
    }


@pytest.fixture
def store(tmp_path):
    made = RowStore(tmp_path / "rows", 300, ARRAYS)
    made.create()
    return made


def test_rows_are_what_was_written_in_whatever_order(store):
    order = np.random.default_rng(0).permutation(300)
    for part in np.split(order, [1, 80, 81, 250]):
        store.write(part, values(part))
    for name, wanted in values(np.arange(300)).items():
        np.testing.assert_array_equal(store.read(name), wanted)
        assert store.read(name).dtype == ARRAYS[name].dtype
    assert store.done(np.arange(300)).all()


def test_only_what_was_written_is_marked_and_the_rest_is_zero(store):
    written = np.array([7, 5, 6, 299])
    store.write(written, values(written))
    assert np.flatnonzero(store.done(np.arange(300))).tolist() == [5, 6, 7, 299]
    np.testing.assert_array_equal(store.done(np.array([6, 4, 7])), [True, False, True])
    assert not np.delete(store.read("pool"), written, axis=0).any()


def test_another_run_goes_on_and_create_changes_nothing(store):
    store.write(np.arange(10), values(np.arange(10)))
    again = RowStore(store.folder, 300, ARRAYS)
    again.create()
    assert again.done(np.arange(300)).sum() == 10
    again.write(np.arange(10, 300), values(np.arange(10, 300)))
    np.testing.assert_array_equal(store.read("near"), values(np.arange(300))["near"])


def test_a_kill_while_it_is_created_leaves_nothing_that_counts(tmp_path):
    """As if it had come before the last file: what is there is made anew."""
    store = RowStore(tmp_path, 4, ARRAYS)
    store.create()
    os.remove(store.path("done"))
    (tmp_path / "pool.npy").write_bytes(b"half a header")
    store.create()
    store.write(np.arange(4), values(np.arange(4)))
    np.testing.assert_array_equal(store.read("pool"), values(np.arange(4))["pool"])


def test_several_writers_do_not_disturb_each_other(store):
    """Every other row from each, as processes share the samples."""
    writers = [RowStore(store.folder, 300, ARRAYS) for _ in range(3)]
    for start in range(0, 300, 60):
        for i, writer in enumerate(writers):
            mine = np.arange(start + i, start + 60, 3)
            writer.write(mine, values(mine))
    np.testing.assert_array_equal(store.read("image"), values(np.arange(300))["image"])


def test_rows_of_another_shape_are_refused(store):
    wrong = values([1, 2]) | {"near": np.zeros((2, 1))}
    with pytest.raises(ValueError, match=r"near: has shape \(2, 1\), not \(2,\)"):
        store.write(np.array([1, 2]), wrong)


def test_rows_that_found_no_room_are_not_marked(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        store.write(np.arange(5), values(np.arange(5)))
    assert not store.done(np.arange(300)).any()


def test_a_disk_that_takes_a_part_gets_the_rest(store, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:5], at))
    store.write(np.arange(40), values(np.arange(40)))
    for name, wanted in values(np.arange(40)).items():
        np.testing.assert_array_equal(store.read(name)[:40], wanted)


def test_nothing_is_left_when_it_is_removed(store, tmp_path):
    store.remove()
    assert not list(tmp_path.iterdir())


# Files that are damaged, as a power loss leaves them


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def nulled(file):
    file.write_bytes(bytes(file.stat().st_size))


def of_other_rows(file):
    np.save(file, np.zeros((300, 4), np.float32))


def not_a_file(file):
    file.unlink()
    os.mkfifo(file)


DAMAGES = [empty, cut, nulled, of_other_rows, not_a_file]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["done", "pool"])
def test_a_damaged_file_is_named_when_it_is_read(store, damage, name):
    damage(store.path(name))
    with pytest.raises(UserError, match=f"{name}.npy: ") as caught:
        store.read(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["done", "near"])
def test_with_one_file_damaged_all_are_made_again(store, damage, name):
    store.write(np.arange(300), values(np.arange(300)))
    damage(store.path(name))
    again = RowStore(store.folder, 300, ARRAYS)
    again.create()
    assert not again.done(np.arange(300)).any()
    again.write(np.arange(300), values(np.arange(300)))
    np.testing.assert_array_equal(again.read("near"), values(np.arange(300))["near"])
