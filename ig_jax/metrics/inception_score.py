"""Inception score: how sure a classifier is of each image, and how varied the images are together.

  score of a split = exp( mean_i sum_c p_ic (log p_ic - log mean_j p_jc) ),   p = softmax(logits)

(Salimans et al., arXiv 1606.03498). It lies between 1 and the number of classes. The two tools that
papers quote cut the images into splits by different rules; they agree only about, not exactly. Both
take the Inception logits *without* the classifier bias.
"""

import numpy as np
from jaxtyping import Float64

from ig_jax.metrics.checked_rows import as_rows, row_blocks

TORCH_FIDELITY_SEED = 2020
TORCH_FIDELITY_SPLITS = 10


def inception_score(logits: np.ndarray, split_size: int) -> tuple[float, Float64[np.ndarray, "s"]]:
    """Mean over splits, and the score of every split, by the rule of the ADM evaluator.

    Splits are runs of `split_size` consecutive rows; the last may be shorter and counts as much as
    the others. ADM uses 5000. Rows are never shuffled, so samples sorted by class must be shuffled
    before: a split of one class scores 1. One split is in memory at a time.

    Args:
      logits: [n, classes], any real dtype; may be memory-mapped.
      split_size: rows per split, at least 1.

    Raises:
      ValueError: logits is empty, not [n, classes] or not finite, or split_size is below 1.
    """
    _require_values(logits)
    if split_size < 1:
        raise ValueError(f"split_size = {split_size}: must be at least 1; ADM uses 5000")
    splits = row_blocks(logits, "logits", split_size)
    per_split = np.array([_split_score(split) for split in splits])
    return float(per_split.mean()), per_split


def inception_score_torch_fidelity(logits: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (ddof = 0) over splits, by the rule of torch-fidelity.

    Rows are shuffled with a fixed seed, then cut into ten splits that differ by one row at most.

    Args:
      logits: [n, classes], any real dtype, n at least 10.

    Raises:
      ValueError: logits is not [n, classes], not finite, or has fewer than ten rows.
    """
    _require_values(logits)
    rows = as_rows(logits, "logits")
    if len(rows) < TORCH_FIDELITY_SPLITS:
        raise ValueError(
            f"logits has {len(rows)} rows: torch-fidelity's score cuts them into "
            f"{TORCH_FIDELITY_SPLITS} splits, each of at least one; generate more"
        )
    order = np.random.RandomState(TORCH_FIDELITY_SEED).permutation(len(rows))
    cuts = [i * len(rows) // TORCH_FIDELITY_SPLITS for i in range(1, TORCH_FIDELITY_SPLITS)]
    per_split = np.array([_split_score(rows[chosen]) for chosen in np.split(order, cuts)])
    return float(per_split.mean()), float(per_split.std())


def _require_values(logits: np.ndarray) -> None:
    if np.size(logits) == 0:
        raise ValueError(
            f"logits has shape {np.shape(logits)}: needs at least one row and one class"
        )


def _split_score(logits: Float64[np.ndarray, "n c"]) -> float:
    return float(np.exp(divergences(logits).mean()))


def divergences(logits: Float64[np.ndarray, "n c"]) -> Float64[np.ndarray, "n"]:
    """Divergence of each image's classes from those of the mean; the score is exp of its mean."""
    # Both logarithms are formed without a probability: one that underflows to 0 has a finite log.
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    log_marginal = np.logaddexp.reduce(log_p, axis=0) - np.log(len(logits))
    return (np.exp(log_p) * (log_p - log_marginal)).sum(axis=1)
