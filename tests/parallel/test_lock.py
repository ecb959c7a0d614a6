"""One program at a time in a folder, whoever was killed before."""

import errno
import fcntl
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest
import tiny

from ig_jax.errors import UserError
from ig_jax.parallel import lock
from ig_jax.parallel.lock import Owner

# Starts three processes that try to lock a folder together, say what came of it, and stay.
CONTENDERS = """
import os, sys
from pathlib import Path
from ig_jax.parallel import lock
from ig_jax.errors import UserError

ready, go = os.pipe()
for _ in range(3):
    if not os.fork():
        os.close(go)
        os.read(ready, 1)
        try:
            with lock.held(Path(sys.argv[1])):
                os.write(1, f"{os.getpid()} holds it\\n".encode())
                sys.stdin.read()
        except UserError as error:
            os.write(1, f"{error}\\n".encode())
        os._exit(0)
os.close(go)
sys.stdin.read()
"""


def left(folder, **changes):
    """A lock file without a process that the system knows of, changed."""
    owner = replace(Owner.here(), **changes)
    (folder / lock.LOCK_FILE).write_text(json.dumps(asdict(owner)))
    return owner


@pytest.fixture
def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "WRITING", 0.05)


def test_a_second_one_is_refused_by_name_until_the_first_has_left(tmp_path):
    folder = tmp_path / "new" / "run"
    with lock.held(folder):
        owner = json.loads((folder / ".lock").read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        words = f"{folder} is in use by process {os.getpid()} on {socket.gethostname()} since "
        with pytest.raises(UserError, match=words), lock.held(folder):
            pass
        with lock.held(folder, ".other.lock"):
            assert sorted(os.listdir(folder)) == [".lock", ".other.lock"]
    assert os.listdir(folder) == []
    with lock.held(folder):
        pass


def test_it_is_left_after_an_error(tmp_path):
    with pytest.raises(KeyError), lock.held(tmp_path):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_of_processes_that_start_together_one_works_and_a_killed_one_is_followed_at_once(
    tmp_path, capfd
):
    command = [sys.executable, "-c", CONTENDERS, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tiny.ROOT, **pipes) as contenders:
        # Who locks the file before its maker does finds it empty, says so, and has the folder.
        lines = (line for line in contenders.stdout if "names nobody" not in line)
        said = list(itertools.islice(lines, 3))
        [winner] = [int(line.split()[0]) for line in said if line.endswith(" holds it\n")]
        # One that gets no time to write its name for seconds is "another process".
        words = rf"{re.escape(str(tmp_path))} is in use by (process {winner} on|another process)"
        assert sum(re.match(words, line) is not None for line in said) == 2
        os.kill(winner, signal.SIGKILL)
        while lock._started(winner) != "ended":  # though its parent never waits for it
            pass
        with lock.held(tmp_path):
            [line] = capfd.readouterr().out.splitlines()
            assert line.startswith(f"{tmp_path}: process {winner} on ") and "taken over" in line


def test_a_killed_process_may_hold_its_lock_a_little_longer(tmp_path, ended, monkeypatch):
    """As long as a thread of it has not ended, which the system does not tell of."""
    left(tmp_path, pid=ended)
    refusals, flock = iter([BlockingIOError(), BlockingIOError()]), fcntl.flock

    def still_held_twice(descriptor, how):
        for refusal in refusals:
            raise refusal
        return flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", still_held_twice)
    with lock.held(tmp_path):
        assert next(refusals, None) is None
    left(tmp_path, pid=os.getppid(), started=lock._started(os.getppid()))
    refusals = iter([BlockingIOError()])
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        with lock.held(tmp_path):
            pass


@pytest.mark.parametrize("flocks", [True, False])
def test_a_stale_lock_is_taken_over_with_a_line(tmp_path, ended, flocks, monkeypatch, capfd):
    if not flocks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    for changes in ({"pid": ended}, {"boot": "another"}, {"started": "12"}):
        owner = left(tmp_path, **changes)
        with lock.held(tmp_path):
            assert Owner.parse((tmp_path / ".lock").read_bytes()).pid == os.getpid()
            [line] = capfd.readouterr().out.splitlines()
            assert line == f"{tmp_path}: {owner} has ended without leaving it; it is taken over"
    assert os.listdir(tmp_path) == []


def no_locks(descriptor, how):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("content", ["", "of one that ended"])
def test_a_file_that_the_system_says_is_locked_is_never_taken_over(
    tmp_path, ended, content, monkeypatch
):
    """Whoever locked it may not have written yet who it is."""
    monkeypatch.setattr(lock, "ENDING", 0.1)  # it waits so long, and never gets it
    left(tmp_path, pid=ended)
    with open(tmp_path / ".lock", "r+") as file:
        if not content:
            file.truncate(0)
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"{tmp_path} is in use by (another )?process"):
            with lock.held(tmp_path):
                pass


def test_whoever_locked_an_empty_file_has_time_to_wait_for_its_maker_and_then_to_write(
    tmp_path, monkeypatch
):
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now > 1.5 * lock.WRITING:
            left(tmp_path, pid=os.getppid(), started=lock._started(os.getppid()))

    monkeypatch.setattr(lock.time, "monotonic", lambda: now)
    monkeypatch.setattr(lock.time, "sleep", sleep)
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"in use by process {os.getppid()} on"):
            with lock.held(tmp_path):
                pass


def test_where_the_system_has_no_locks_the_file_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock.held(tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            with lock.held(tmp_path):
                pass
    with lock.held(tmp_path):
        pass


def test_a_lock_of_another_machine_that_is_touched_meanwhile_is_refused(
    tmp_path, monkeypatch, capfd
):
    left(tmp_path, host="other-host", pid=7)
    file = tmp_path / ".lock"

    def touched_meanwhile(seconds: float) -> None:
        os.utime(file, ns=(0, os.stat(file).st_mtime_ns + 1))

    monkeypatch.setattr(lock.time, "sleep", touched_meanwhile)
    with pytest.raises(UserError, match="in use by process 7 on other-host"), lock.held(tmp_path):
        pass
    said = capfd.readouterr().out
    assert "waiting 180 s to see whether process 7 on other-host" in said
    assert json.loads(file.read_text())["pid"] == 7


def test_a_lock_of_another_machine_that_has_been_silent_is_taken_over_at_once(tmp_path, capfd):
    left(tmp_path, host="other-host", pid=7)
    file = tmp_path / ".lock"
    before = os.stat(file).st_mtime - lock.SILENT
    os.utime(file, (before, before))
    there = open(file)  # keeps its number of a file from being used again
    with lock.held(tmp_path):
        said = capfd.readouterr().out
        assert "process 7 on other-host" in said and "is silent; it is taken over" in said
        assert "waiting" not in said
        # Should its owner go on after a pause, it finds that its own file is gone.
        assert not os.path.samestat(os.fstat(there.fileno()), os.stat(file))
        assert json.loads(file.read_text())["pid"] == os.getpid()
    there.close()


def test_a_lock_of_another_machine_that_stays_silent_is_taken_over(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(lock, "SILENT", 0.05)
    left(tmp_path, host="other-host", pid=7)
    with lock.held(tmp_path):
        assert "process 7 on other-host" in capfd.readouterr().out


def test_a_lock_of_another_machine_that_is_released_meanwhile_is_free(tmp_path, monkeypatch):
    left(tmp_path, host="other-host", pid=7)
    monkeypatch.setattr(lock.time, "sleep", lambda _: (tmp_path / ".lock").unlink())
    with lock.held(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_who_holds_a_lock_touches_it_and_stops_when_it_is_released(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.001)
    file = tmp_path / ".lock"
    with lock.held(tmp_path):
        os.utime(file, (0, 0))
        while os.stat(file).st_mtime == 0:  # a test that hangs has failed
            pass
    file.touch()
    while any(thread.name == "lock" for thread in threading.enumerate()):
        pass
    os.utime(file, (0, 0))
    assert os.stat(file).st_mtime == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\0" * 300, b"[]", b"null", b"{}", b"[" * 5000, b'{"host": "a"}', b"\xff"]
    + [
        json.dumps(asdict(Owner("a", 1, "b", "c", "d")) | change).encode()
        for change in ({"pid": "1"}, {"host": None}, {"since": 3}, {"more": 1})
    ],
)
def test_a_damaged_lock_names_nobody_and_is_taken_over(tmp_path, content, capfd):
    (tmp_path / ".lock").write_bytes(content)
    with lock.held(tmp_path):
        assert "names nobody; the folder is taken over" in capfd.readouterr().out
        assert Owner.parse((tmp_path / ".lock").read_bytes()).pid == os.getpid()


def test_a_process_that_is_only_not_waited_for_has_ended():
    with subprocess.Popen(["true"]) as process:
        while lock._started(process.pid) != "ended":
            pass
    assert lock._started(process.pid) == "ended" and lock._started(os.getpid()) not in ("", "ended")


def test_what_is_removed_or_replaced_while_it_is_held_is_noticed(tmp_path):
    folder = tmp_path / "run"
    another = lock.held(folder)
    with lock.held(folder) as held:
        held.require()
        (folder / ".lock").unlink()
        with pytest.raises(UserError, match=f"{folder}: was removed, or its .lock was"):
            held.require()
        new = another.__enter__()
        with pytest.raises(UserError, match="was removed"):
            held.require()
    new.require()  # the first one left it alone
    another.__exit__(None, None, None)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("obstacle", ["a file above", "a link", "a folder"])
def test_a_place_that_cannot_be_locked_is_told(tmp_path, obstacle):
    folder = tmp_path / "run"
    if obstacle == "a file above":
        folder.write_text("")
    else:
        folder.mkdir()
        (folder / ".lock").symlink_to("elsewhere") if obstacle == "a link" else (
            folder / ".lock"
        ).mkdir()
    with pytest.raises(UserError, match=f"{folder}: cannot be written to"), lock.held(folder):
        pass


def test_threads_of_a_process_keep_each_other_out(tmp_path):
    refused = []

    def other():
        try:
            with lock.held(tmp_path):
                pass
        except UserError as error:
            refused.append(error)

    with lock.held(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_when_process_0_is_refused_the_others_hear_of_it(tmp_path, monkeypatch):
    """What the others do is here done by a process that says it is number 1."""
    monkeypatch.setattr(lock.jax, "process_index", lambda: 1)
    monkeypatch.setattr(lock, "from_process_0", lambda answer: True)
    with pytest.raises(UserError, match="process 0 cannot lock it, and says why"):
        with lock.held(tmp_path):
            pass
    monkeypatch.setattr(lock, "from_process_0", lambda answer: False)
    with lock.held(tmp_path) as held:
        held.require()
    assert os.listdir(tmp_path) == []
