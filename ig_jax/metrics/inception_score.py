"""Inception score: how sure a classifier is of each image, and how varied the images are together.

  score of a split = exp( mean_i sum_c p_ic (log p_ic - log mean_j p_jc) ),   p = softmax(logits)

(Salimans et al., arXiv 1606.03498). It lies between 1 and the number of classes.
"""

import numpy as np
from jaxtyping import Float64

from ig_jax.metrics.rows import as_rows


def inception_score(logits: np.ndarray, split_size: int) -> tuple[float, Float64[np.ndarray, "s"]]:
    """Mean over splits, and the score of every split, by the rule of the ADM evaluator.

    Splits are runs of `split_size` consecutive rows; the last may be shorter and counts as much as
    the others. ADM uses 5000 and the Inception logits *without* the classifier bias. Rows are never
    shuffled, so samples sorted by class must be shuffled before: a split of one class scores 1.
    torch-fidelity differs: it shuffles with a fixed seed, cuts into ten parts whatever their size,
    and also reports the spread. The two agree only about, not exactly.

    Args:
      logits: [n, classes], any real dtype.
      split_size: rows per split, at least 1.

    Raises:
      ValueError: logits is empty, not [n, classes] or not finite, or split_size is below 1.
    """
    rows = as_rows(logits, "logits")
    if rows.size == 0:
        raise ValueError(f"logits has shape {rows.shape}: needs at least one row and one class")
    if split_size < 1:
        raise ValueError(f"split_size = {split_size}: must be at least 1; ADM uses 5000")
    starts = range(0, len(rows), split_size)
    per_split = np.array([_split_score(rows[start : start + split_size]) for start in starts])
    return float(per_split.mean()), per_split


def _split_score(logits: Float64[np.ndarray, "n c"]) -> float:
    # Both logarithms are formed without a probability: one that underflows to 0 has a finite log.
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    log_marginal = np.logaddexp.reduce(log_p, axis=0) - np.log(len(logits))
    divergence = (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
    return float(np.exp(divergence.mean()))
