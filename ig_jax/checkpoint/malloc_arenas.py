"""Memory that glibc's allocator keeps: freed by the program, but not given back to the system.

Every save of a checkpoint starts threads, and glibc gives threads heaps ("arenas") of their own, up
to eight a core, which it neither shares nor empties: a long run that saves often holds more and
more of them. A few arenas are enough here, as the work is done outside of Python and of malloc.
"""

from __future__ import annotations

import ctypes
from functools import cache

ARENAS = 4
M_ARENA_MAX = -8  # of mallopt(3)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    try:
        library = ctypes.CDLL("libc.so.6")
        _ = library.malloc_trim, library.mallopt
    except (OSError, AttributeError):
        return None
    return library


def limit() -> None:
    """Lets threads that start from now on share a few arenas."""
    library = _glibc()
    if library:
        library.mallopt(M_ARENA_MAX, ARENAS)


def trim() -> None:
    """Gives what is free back to the system; takes some milliseconds."""
    library = _glibc()
    if library:
        library.malloc_trim(0)
