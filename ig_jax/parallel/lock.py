"""One program at a time in a folder.

A lock is a file that says who works there, and that the system locks (flock) for as long as the
process lives: a killed one leaves the file, but not the system's lock. Where a file system has no
such locks, or does not share them between hosts, what the file says decides: it is created by
one process alone, and taken over only from one that has ended. Of another host nothing else can be
known than that the process there touches its file now and then: a preempted job that starts again
elsewhere waits until it has not for a while.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax

from ig_jax.errors import UserError
from ig_jax.io import files
from ig_jax.monitoring import console
from ig_jax.parallel.processes import from_process_0

LOCK_FILE = ".lock"
WRITING = 1.0  # seconds in which whoever made the file has written who it is
ENDING = 30.0  # seconds that a killed process may take to let go of what it holds
_LARGEST = 4096  # bytes that are read of it
BEAT = 30.0  # seconds after which the file is touched
SILENT = 180.0  # seconds without that, after which the process has ended; NFS may hide it for 60


class InUse(UserError):
    """Another program works in the folder."""


@dataclass(frozen=True)
class Owner:
    """A process. The last three are '' where the system does not tell."""

    host: str
    pid: int
    boot: str  # which start of the machine
    started: str  # when the process did, in the machine's ticks: numbers of processes come again
    since: str  # date and time

    @classmethod
    def here(cls) -> Owner:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _boot(), _started(pid), since)

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """Parses a lock file; None if it is damaged, or not written yet."""
        with suppress(UserError, TypeError):
            owner = cls(**files.parse_json(content, LOCK_FILE))
            if isinstance(owner.pid, int) and all(
                isinstance(text, str) for name, text in asdict(owner).items() if name != "pid"
            ):
                return owner
        return None

    def is_elsewhere(self) -> bool:
        """Returns whether it runs on another machine, where nothing can be known of it."""
        return self.host != socket.gethostname()

    def has_ended(self) -> bool:
        """Of a process of this machine."""
        return self.boot != _boot() or self.started != _started(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started(pid: int) -> str:
    """When a process of this machine started; 'ended' if there is none."""
    try:
        # Behind the program's name, which may hold anything: state, ..., 20th: the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return "ended"
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return "ended"
    return ""


@dataclass(frozen=True)
class Held:
    """A lock of this process, or of process 0 for all."""

    folder: Path
    file: Path
    descriptor: int | None  # None: process 0 has it
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        if self.descriptor is not None:
            threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _beat(self) -> None:
        while not self.released.wait(BEAT):
            # By the name: the descriptor may be closed by now, and its number in use again. A
            # folder that is gone is reported by `require`.
            with suppress(OSError):
                os.utime(self.file)

    def require(self) -> None:
        """Raises UserError if the folder or the lock is gone: then another may work there."""
        if self.descriptor is not None and not _lies_at(self.descriptor, self.file):
            raise UserError(
                f"{self.folder}: was removed, or its {self.file.name} was, while a program worked "
                "in it; run the same command again"
            )

    def release(self) -> None:
        if self.descriptor is None:
            return
        self.released.set()
        with suppress(OSError):  # it is of no more use
            if _lies_at(self.descriptor, self.file):
                self.file.unlink()
        os.close(self.descriptor)


@contextmanager
def held(folder: Path, name: str = LOCK_FILE) -> Iterator[Held]:
    """Makes the folder, and keeps other programs out that want the lock of this name in it.

    Of several processes of a job, number 0 takes the lock for all; all must ask.

    Raises:
      InUse: a program works there, or on another machine may; names it.
      UserError: the folder cannot be written to.
    """
    lock, refusal = Held(folder, folder / name, None), None
    if jax.process_index() == 0:
        try:
            lock = _take(folder, name)
        except UserError as error:
            refusal = error
    if from_process_0(refusal is not None):
        raise refusal or UserError(f"{folder}: process 0 cannot lock it, and says why")
    try:
        yield lock
    finally:
        lock.release()


def _take(folder: Path, name: str) -> Held:
    file = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileNotFoundError):  # it was released between the two attempts
                descriptor = _attempt(file)
                if descriptor is not None:
                    return Held(folder, file, descriptor)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror}); name another folder, or get the "
            "right to write there"
        ) from error


def _attempt(file: Path) -> int | None:
    """The locked file, open, or None where it was replaced meanwhile.

    Raises:
      InUse: another process has it.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor, created = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o644), True
    except FileExistsError:
        descriptor, created = os.open(file, flags), False
    try:
        _lock(descriptor, file)
        if not _lies_at(descriptor, file):
            os.close(descriptor)
            return None
        if not created and not _take_over(descriptor, file):
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Owner.here())).encode(), 0)
        os.fsync(descriptor)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


_OR = "wait until it ends, or name another folder"


def _take_over(descriptor: int, file: Path) -> bool:
    """Returns whether the file is now that of this process, or has to be made anew.

    Raises:
      InUse: whoever left the file still works there.
    """
    owner = _owner(descriptor, WRITING)
    if owner is None:
        console.say(f"{file}: names nobody; the folder is taken over")
    elif owner.is_elsewhere():
        _wait_for_silence(descriptor, file, owner)
        # A new file: should its owner go on after a pause, it finds that this one is gone.
        if _lies_at(descriptor, file):
            file.unlink()
        return False
    elif not owner.has_ended():
        raise InUse(f"{file.parent} is in use by {owner}; {_OR}")
    else:
        console.say(f"{file.parent}: {owner} has ended without leaving it; it is taken over")
    return True


def _wait_for_silence(descriptor: int, file: Path, owner: Owner) -> None:
    """Returns when a process of another machine has not touched its file for long enough.

    Raises:
      InUse: it has, meanwhile.
    """
    touched = os.fstat(descriptor).st_mtime_ns
    # By the clock of the file system, which is that of neither machine.
    left = SILENT - (_clock_of(file.parent) - touched) / 1e9
    if left > 0:
        console.say(
            f"{file.parent}: waiting {left:.0f} s to see whether {owner} still works there; if it "
            f"has ended, you may remove {file}"
        )
    deadline = time.monotonic() + left
    while True:
        if not _lies_at(descriptor, file):  # it was released, or removed by hand
            return
        if os.stat(file).st_mtime_ns != touched:
            raise InUse(f"{file.parent} is in use by {owner}; {_OR}")
        if time.monotonic() >= deadline:
            console.say(f"{file.parent}: {owner} is silent; it is taken over")
            return
        time.sleep(min(1.0, BEAT / 10))


def _clock_of(folder: Path) -> int:
    """The time, in nanoseconds, as the file system of a folder has it."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        os.utime(probe.fileno())
        return os.fstat(probe.fileno()).st_mtime_ns


def _owner(descriptor: int, patience: float) -> Owner | None:
    """Waits so many seconds until the file names an owner, and returns it."""
    deadline = time.monotonic() + patience
    while True:
        owner = Owner.parse(os.pread(descriptor, _LARGEST, 0))
        if owner is not None or time.monotonic() > deadline:
            return owner
        time.sleep(0.01)


def _lock(descriptor: int, file: Path) -> None:
    """Locks the file. A killed process keeps its lock until the last of its threads has ended.

    Raises:
      InUse: another process has it.
    """
    deadline = time.monotonic() + ENDING
    while not _flock(descriptor):
        # Twice: whoever has it locked may itself wait so long for a name of its maker.
        owner = _owner(descriptor, 2 * WRITING)
        is_ending = owner is not None and not owner.is_elsewhere() and owner.has_ended()
        if not is_ending or time.monotonic() > deadline:
            raise InUse(f"{file.parent} is in use by {owner or 'another process'}; {_OR}")
        time.sleep(0.01)


def _flock(descriptor: int) -> bool:
    """Returns whether no living process has the file locked, as far as its file system can tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # there are no such locks here
        return True
    return True


def _lies_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False
