"""Intervals by Student's t, against SciPy's and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from ig_jax.study.paired import interval, paired

A, B = [1.31, 0.97, 1.22, 1.08, 1.43], [1.16, 1.02, 1.01, 0.93, 1.37]


def test_an_interval_of_three_values_by_hand():
    found = interval([2.0, 4.0, 9.0])
    # s^2 = (9 + 1 + 16) / 2, and t(2) at 97.5 % is 4.302653
    assert found.mean == 5.0 and found.n == 3
    assert found.half == pytest.approx(4.302653 * math.sqrt(13 / 3), rel=1e-6)


def test_intervals_are_scipys():
    theirs = stats.ttest_1samp(A, 0).confidence_interval(0.95)
    found = interval(A)
    np.testing.assert_allclose(
        [found.mean - found.half, found.mean + found.half], theirs, rtol=1e-12
    )


def test_a_paired_difference_is_scipys_and_has_a_sign():
    theirs = stats.ttest_rel(A, B).confidence_interval(0.95)
    found = paired(A, B)
    assert found.mean == pytest.approx(np.mean(A) - np.mean(B))
    np.testing.assert_allclose(
        [found.mean - found.half, found.mean + found.half], theirs, rtol=1e-12
    )
    assert found.half < interval(A).half  # what the seeds share is gone


def test_whether_zero_lies_outside():
    assert paired([1.0, 1.1, 1.2], [0.0, 0.1, 0.3]).excludes_zero
    assert not paired(A, B[::-1]).excludes_zero


def test_one_value_has_no_interval():
    assert math.isnan(interval([3.0]).half) and not interval([3.0]).excludes_zero


def test_seeds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="zip"):
        paired(A, B[:4])
