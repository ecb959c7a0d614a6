"""Parts of a data set: disjoint, complete, and the same whatever they are used for."""

import numpy as np
import pytest

from ig_jax.data.sources.digits import Digits
from ig_jax.data.sources.synthetic import Synthetic
from ig_jax.data.subset import Subset, split


def of(size: int) -> Synthetic:
    return Synthetic(2, 1, 3, size)


@pytest.mark.parametrize(
    "size, share, expected",
    [
        (1_281_167, 0.01, 12_812),  # the share
        (50_000, 0.01, 1000),  # enough to choose by
        (1442, 0.01, 288),  # a fifth of few
        (1442, 0.5, 721),
        (3, 0.01, 1),
        (2, 0.5, 1),
    ],
)
def test_the_validation_part_is_large_enough(size, share, expected):
    kept, validation = split(of(size), share, seed=0)
    assert (len(kept), len(validation)) == (size - expected, expected)


def test_parts_are_disjoint_complete_and_drawn_by_the_seed():
    kept, validation = split(of(300), 0.3, seed=4)
    both = np.concatenate([kept.indices, validation.indices])
    np.testing.assert_array_equal(np.sort(both), np.arange(300))
    again, other = split(of(300), 0.3, seed=4), split(of(300), 0.3, seed=5)
    np.testing.assert_array_equal(again[1].indices, validation.indices)
    assert len(set(other[1].indices) & set(validation.indices)) < 60
    assert validation.indices.tolist() != list(range(validation.indices.min(), 300))


def test_a_subset_holds_the_examples_of_its_indices():
    source = Digits("train")
    part = Subset(source, np.array([41, 7, 1300]))
    assert len(part) == 3 and part.num_classes == 10 and part.stored_shape == (8, 8, 1)
    assert part.stored_dtype == np.uint8 and part.held_out() == Digits("held_out")
    found, expected = part.batch(np.array([2, 0])), source.batch(np.array([1300, 41]))
    for name in ("stored", "label"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_one_example_cannot_be_parted():
    with pytest.raises(ValueError, match="holds 1 examples: two parts need at least two"):
        split(of(1), 0.01, seed=0)
