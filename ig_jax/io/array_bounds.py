"""Sizes that a file declares, held against the bytes that are there before any memory is taken."""

from __future__ import annotations

import math
from typing import Any

from ig_jax.errors import shown

MOST_AXES = 32


def require_fit(shape: Any, itemsize: int, held: int) -> None:
    """Refuses the shape of an array unless its elements are exactly the bytes that are there.

    An array of no elements may have no rows only: rows without elements cost a file nothing, so
    that their number would be bounded by nothing.

    Args:
      shape: a tuple or list as the file gives it, of anything.
      itemsize: bytes of an element.
      held: bytes that are there for the array.

    Raises:
      ValueError: it is no shape, has more than `MOST_AXES` axes, or needs other than these bytes.
    """
    if not isinstance(shape, tuple | list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{shown(shape)} is no shape")
    if len(shape) > MOST_AXES:
        raise ValueError(f"a shape of {len(shape)} axes is more than the {MOST_AXES} allowed")
    if itemsize < 1 or (0 in shape and shape[0] != 0):
        raise ValueError(f"the shape {shown(shape)} has rows without elements")
    # Python's own integers, which do not overflow; all axes but those of size 0, as numpy counts.
    size = math.prod(n for n in shape if n) * itemsize
    if (0 in shape and (held or size >= 2**63)) or (0 not in shape and size != held):
        need = 0 if 0 in shape else size
        raise ValueError(
            f"the shape {shown(shape)} needs {shown(need)} bytes, but {held} are there"
        )
