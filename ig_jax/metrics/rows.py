"""The form in which every metric takes its input: finite float64, one row per image."""

import numpy as np
from jaxtyping import Float64


def as_rows(values: np.ndarray, name: str) -> Float64[np.ndarray, "n d"]:
    """`values` as float64 [n, d]; `name` is what the error calls it.

    Raises:
      ValueError: `values` is not a matrix, or a row holds NaN or infinity: a single such row would
        turn the whole metric into NaN without telling which image is to blame.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(
            f"{name} has shape {rows.shape}: must be [n, d], one row per image; "
            "flatten or pool the other axes first"
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{name} row {bad[0]} (first of {bad.size} among {len(rows)}) holds NaN or infinity: "
            "every value must be finite; look at the image or the weights behind it"
        )
    return rows
