"""Accuracy of a linear classifier on the mean tokens of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ig_jax.errors import UserError
from ig_jax.evaluation.encoders import all_of
from ig_jax.pipeline import Pipeline
from ig_jax.types import Source

MOST = 20_000  # examples whose features are held at a time


def name(block: int, time: float) -> str:
    """Of a measure: 'probe_2_0.1'."""
    return f"probe_{block}_{time:g}"


def heading(measure: str) -> str:
    """Heading of a measure in a table."""
    _, block, time = measure.split("_")
    return f"linear probe %, block {block}, t = {time}"


def accuracy(
    pipeline: Pipeline, source: Source, blocks: Sequence[int], time: float, seed: int
) -> dict[str, float]:
    """Shares of held-out examples that are classified right, {name(block, time): share}.

    Tokens at `time`, under the null class, averaged over positions and standardised; logistic
    regression, fitted to the training examples.

    Raises:
      UserError: no examples are held out, or there are too many to hold.
    """
    held_out = source.held_out()
    if held_out is None or len(source) > MOST:
        raise UserError(
            "study.measures: 'probe' needs held-out examples, and at most "
            f"{MOST:,} to train on; leave it out for this data.source"
        )
    # Imported here because it takes a second that other programs need not pay.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = []
    for part in (source, held_out):
        stored, labels = all_of(part)
        tokens = pipeline.features(stored, time, blocks, seed=seed)
        parts.append(({b: np.asarray(x).mean(axis=1) for b, x in tokens.items()}, labels))
    (train, train_labels), (test, test_labels) = parts
    found = {}
    for block in blocks:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        model.fit(train[block], train_labels)
        found[name(block, time)] = float(model.score(test[block], test_labels))
    return found
