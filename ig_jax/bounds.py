"""Bounds on the values of settings, and the metadata of fields that sets others."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

WHOLE = 2**31 - 1  # most of a whole number whose field names no other bound: int32
# Size of the largest and of the smallest number: all are float32 in the end, subnormal ones 0.
LARGE, SMALL = 1e37, 1e-37
CHARACTERS = 4096  # of a text: Linux has no longer paths
ENTRIES = 1000  # of a tuple
NESTED = 20  # sections in sections
BELOW_ONE = "must lie in [0, 1), also as float32"


def at_most(bound: int, default: Any = dataclasses.MISSING) -> Any:
    """A field of another bound than its type's: on the size of a whole number, or on characters."""
    return dataclasses.field(default=default, metadata={"most": bound})


def unset(
    recorded: int | float | str, default: Any = dataclasses.MISSING, *, most: int | None = None
) -> Any:
    """A field of type `X | None` that is None where it is not set.

    Records of runs have always held 0 or '' there, and still do, so that old and new ones, and the
    names of folders made from them, are the same. A config may say either.

    Args:
      recorded: that 0 or ''.
      default: of the field.
      most: see `at_most`.
    """
    return dataclasses.field(default=default, metadata={"unset": recorded, "most": most})


def optional_section() -> Any:
    """A field of type `Section | None` that is None where a config lacks it, or says None.

    Records of runs lack it then: they are those from before there was such a section.
    """
    return dataclasses.field(default=None, kw_only=True, metadata={"unset": None})


def below_one(value: float) -> bool:
    """Returns whether a number lies in [0, 1), also once it is a float32."""
    return 0 <= value and bool(np.float32(value) < 1)
