"""The form in which every metric takes its input: finite numbers, one row per image."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float64

BLOCK_ROWS = 5000  # 80 MB in float64 at 2048 features


def row_blocks(values: np.ndarray, name: str, size: int) -> Iterator[Float64[np.ndarray, "rows d"]]:
    """`values` [n, d] as float64 in runs of `size` rows, the last of which may be shorter.

    No more than one block exists at a time, so that a memory-mapped file may be larger than the
    memory. There is always a block, with no rows if `values` has none. `name` is what the error
    calls `values`.

    Raises:
      ValueError: `values` is not a matrix, or a row holds NaN or infinity: a single such row would
        turn the whole metric into NaN without telling which image is to blame.
    """
    values = np.asarray(values)
    if values.ndim != 2:
        raise ValueError(
            f"{name} has shape {values.shape}: must be [n, d], one row per image; "
            "flatten or pool the other axes first"
        )
    for start in range(0, max(len(values), 1), size):
        with np.errstate(invalid="ignore"):  # a signalling NaN of a damaged file; see below
            block = np.asarray(values[start : start + size], dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if bad.size:
            raise ValueError(
                f"{name} row {start + bad[0]} of {len(values)} holds NaN or infinity: every value "
                "must be finite; look at the image or the weights behind it"
            )
        yield block


def as_rows(values: np.ndarray, name: str) -> Float64[np.ndarray, "n d"]:
    """All of `values` as one block.

    Raises:
      ValueError: as `row_blocks`.
    """
    (rows,) = row_blocks(values, name, size=max(len(values), 1))
    return rows
