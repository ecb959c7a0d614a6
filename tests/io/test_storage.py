"""Disks that are read-only, broken or gone end programs in one sentence; others' words stay off."""

import errno
import os
import shutil
import sys
import threading

import numpy as np
import pytest
import tiny
from tiers import slow_but

from ig_jax import modes
from ig_jax.errors import UserError
from ig_jax.io import disk_errors, files
from ig_jax.io.row_store import Row, RowStore
from ig_jax.monitoring import library_logs, metric_writer
from ig_jax.programs import evaluate, reference, sample
from ig_jax.training import trainer

DISK_ERRORS = {
    errno.EROFS: "Read-only file system; mount it for writing",
    errno.EACCES: "Permission denied; restore the right to write there",
    errno.EIO: "Input/output error; check the disk",
    errno.ESTALE: "Stale file handle; mount it again",
    errno.ENOSPC: r"No space left on device \(.* MiB free for .*\); make room",
}


def test_the_number_is_found_wherever_it_is():
    plain = OSError(errno.EROFS, "Read-only file system")
    text = ValueError("NOT_FOUND: Error opening [source: x] os_error_code='5'")
    assert disk_errors.number(plain) == errno.EROFS and disk_errors.number(text) == errno.EIO
    try:
        try:
            raise plain
        except OSError:
            raise RuntimeError("cannot schedule new futures after shutdown")  # noqa: B904
    except RuntimeError as error:
        assert disk_errors.number(error) == errno.EROFS
    assert disk_errors.number(KeyError("x")) is None
    assert disk_errors.number(ConnectionResetError(errno.ECONNRESET, "reset")) is None


def test_an_absent_file_counts_only_where_it_is_what_went_wrong():
    """Looking for a file that need not be there is usual; a fault after it is another's."""
    absent = FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
    assert disk_errors.number(absent) == errno.ENOENT
    try:
        try:
            raise absent
        except OSError:
            raise TypeError("a mistake of ours")  # noqa: B904
    except TypeError as error:
        assert disk_errors.number(error) is None


@pytest.mark.parametrize("number", DISK_ERRORS)
def test_an_error_of_a_disk_is_one_sentence_and_any_other_is_raised(tmp_path, number):
    with pytest.raises(
        UserError, match=f"{tmp_path}: {DISK_ERRORS[number]}.* what is done is kept"
    ):
        with disk_errors.reported(tmp_path):
            raise OSError(number, os.strerror(number))
    with pytest.raises(UserError, match=f"^a file: {DISK_ERRORS[number]}"):
        with disk_errors.reported(tmp_path):
            raise OSError(number, os.strerror(number), "a file")
    with pytest.raises(KeyError), disk_errors.reported(tmp_path):
        raise KeyError
    with pytest.raises(UserError, match="^as it is$"), disk_errors.reported(tmp_path):
        raise UserError("as it is")


def test_whatever_is_raised_when_the_folder_is_gone_that_is_what_is_told(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(UserError, match=f"{folder}: was removed while a program worked in it"):
        with disk_errors.reported(folder):
            folder.rmdir()
            raise RuntimeError("cannot schedule new futures after shutdown")


def failing(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def workdir(tmp_path):
    """The tiny run at step 18 of 24."""
    workdir = tiny.trained().copy(tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "24")
    return workdir


@pytest.mark.parametrize("number", slow_but([errno.EIO], [errno.EROFS, errno.EIO]))
def test_training_ends_in_a_sentence_when_its_disk_fails(workdir, number, monkeypatch):
    trained = trainer.Trainer._advance

    def fails_then(self, steps, bar):
        # Of metrics.jsonl.
        monkeypatch.setattr(metric_writer, "open", failing(number), raising=False)
        return trained(self, steps, bar)

    monkeypatch.setattr(trainer.Trainer, "_advance", fails_then)
    with pytest.raises(UserError, match=DISK_ERRORS[number]):
        trainer.run(tiny.experiment(), workdir)


@pytest.mark.slow
@pytest.mark.parametrize("left", ["nothing", "another run's lock"])
def test_training_ends_in_a_sentence_when_its_workdir_is_removed(workdir, left, monkeypatch):
    advance = trainer.Trainer._advance

    def removed(self, steps, bar):
        advance(self, steps, bar)
        shutil.rmtree(workdir, ignore_errors=True)
        if left != "nothing":
            workdir.mkdir(exist_ok=True)
            (workdir / ".lock").write_text("")

    monkeypatch.setattr(trainer.Trainer, "_advance", removed)
    with pytest.raises(UserError, match=f"{workdir}: was removed"):
        trainer.run(tiny.experiment(), workdir)
    kept = [".lock"] if left != "nothing" else []
    assert (os.listdir(workdir) if workdir.exists() else []) == kept


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_sampling_judging_and_statistics_end_in_a_sentence(tmp_path, number, monkeypatch):
    workdir = tiny.trained().copy(tmp_path / "run")
    exp = tiny.experiment({"sample.files": ("npz",)})
    monkeypatch.setattr(RowStore, "_put", failing(number))
    for program in (sample.run, evaluate.run):
        with pytest.raises(UserError, match=DISK_ERRORS[number]):
            program(exp, workdir)
    monkeypatch.undo()
    monkeypatch.setattr(files, "sync", failing(number))
    with pytest.raises(UserError, match=DISK_ERRORS[number]):
        reference.run(exp, tmp_path / "reference")


def test_samples_whose_folder_is_removed_end_in_a_sentence(tmp_path, monkeypatch):
    workdir = tiny.trained().copy(tmp_path / "run")
    write = sample.SampleWriter.write

    def removed(self, *args):
        shutil.rmtree(workdir / "samples")
        write(self, *args)

    monkeypatch.setattr(sample.SampleWriter, "write", removed)
    with pytest.raises(UserError, match="samples/.*: was removed while a program worked in it"):
        sample.run(tiny.experiment(), workdir)


def test_a_workdir_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"{place}: cannot be written to"):
            modes.run(tiny.settings(), workdir=place)


def test_a_partly_written_piece_of_metrics_is_undone_where_that_is_possible(tmp_path, monkeypatch):
    file = metric_writer.Appended(tmp_path / "lines")
    file.add(b"one\n")
    monkeypatch.setattr(os, "truncate", failing(errno.EIO))
    monkeypatch.setattr(metric_writer, "open", failing(errno.EROFS), raising=False)
    with pytest.raises(OSError, match="Read-only"):
        file.add(b"two\n")
    monkeypatch.undo()
    file.close()
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"
    metric_writer.Appended(tmp_path / "none").close()
    assert not (tmp_path / "none").exists()


def test_a_failing_disk_s_echo_in_threads_and_coroutines_is_dropped_and_nothing_else(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: heard.append(u.exc_value))
    monkeypatch.setattr(threading, "excepthook", lambda u: heard.append(u.exc_value))
    library_logs.silence.__wrapped__()
    other = ValueError("a mistake")
    errors = [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: os_error_code='28'"),
        RuntimeError("Event loop is closed"),
        other,
    ]

    class Falls:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            raise self.error

    def falls(error):
        raise error

    for error in errors:
        Falls(error)
        thread = threading.Thread(target=falls, args=(error,))
        thread.start()
        thread.join()
    assert heard == [other, other]


def test_rows_are_begun_anew_where_a_file_of_them_is_damaged(tmp_path):
    arrays = {"pool": Row((3,), np.float32), "near": Row((), np.float64)}
    store = RowStore(tmp_path / "rows", 50, arrays)
    store.create()
    whole = {name: store.path(name).read_bytes() for name in ("pool", "near", "done")}
    rows = {"pool": np.ones((50, 3)), "near": np.ones(50)}
    for name, content in whole.items():
        for damaged in (
            b"",
            content[:70],
            content[:-1],
            content + b"\0",
            bytes(len(content)),
            content.replace(b"50", b"51", 1),
            None,
        ):
            store.write(np.arange(50), rows)
            store.path(name).unlink()
            if damaged is not None:
                store.path(name).write_bytes(damaged)
            again = RowStore(store.folder, 50, arrays)
            again.create()
            assert {n: again.path(n).read_bytes() for n in whole} == whole
    store.write(np.arange(50), rows)
    again.create()
    assert again.done(np.arange(50)).all()  # what is whole stays
