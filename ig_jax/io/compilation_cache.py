"""Compiled programs kept on disk, so that the same command does not compile the same again.

JAX's own cache, in a folder of this user's, with a bound on its size. What is found there is run,
so nobody else may write to the folder. And a program for a CPU holds that processor's own
instructions, so a home folder that several machines share has a folder for each kind of them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from pathlib import Path

import filelock
import jax

MOST_BYTES = 2**30  # of all programs of one kind of processor; those used least leave first
SHORTEST_SECONDS = 0.2  # of compiling; many programs take less, and are not worth a file
PATIENCE = 10  # seconds in which another process should have read or written its program

# An entry is written first, then the time of its last use.
_PROGRAM, _USED = "-cache", "-atime"


def keep_programs() -> str | None:
    """Keeps what this process compiles from now on, unless the environment says where or whether.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps
    nothing.

    Returns:
      Why programs cannot be kept; None if they are, or need not be.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None
    try:
        folder = place()
        _make_private(folder)
        with filelock.FileLock(folder / ".lockfile", timeout=PATIENCE):  # as JAX locks it
            _remove_halves(folder)
    except (OSError, RuntimeError) as error:  # no home, no permission, no room, no locks, ...
        return str(error)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)
    return None


def place() -> Path:
    """The folder of this user's programs for this kind of processor.

    Raises:
      RuntimeError: there is no home folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of base directories has relative paths ignored.
    root = Path(caches) if os.path.isabs(caches) else Path.home() / ".cache"
    return root / "ig-jax" / f"programs-{_processor()}"


def _processor() -> str:
    """A name for processors that have the same instructions."""
    told = [platform.system(), platform.machine(), platform.processor()]
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:  # not Linux
        first = ""
    lines = (line.partition(":") for line in first.splitlines())
    told += [value for key, _, value in lines if key.strip() in ("model name", "flags", "Features")]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _make_private(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {folder}, and what is there would be run")


def _remove_halves(folder: Path) -> None:
    """Removes what a process that was killed on the way has written of a program."""
    for whole, half in ((_PROGRAM, _USED), (_USED, _PROGRAM)):
        for path in folder.glob(f"*{whole}"):
            if not path.with_name(path.name.removesuffix(whole) + half).exists():
                path.unlink()
