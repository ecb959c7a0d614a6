"""Real images that need no download: scikit-learn's bundled 8x8 handwritten digits.

1797 grey images in 10 classes (UCI optical recognition of handwritten digits, test part). Pixel
values 0..16 become uint8 0..255. The split is fixed: every fifth image of each class is held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ig_jax.data.subset import every_nth_of_class
from ig_jax.errors import shown

_SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Digits:
    """uint8 images [8, 8, 1] with labels 0..9."""

    split: str  # train (1442 images), held_out (355)

    stored_shape = (8, 8, 1)
    stored_dtype = np.uint8
    num_classes = 10

    def __post_init__(self):
        if self.split not in _SPLITS:
            raise ValueError(f"split = {shown(self.split)}: must be one of {', '.join(_SPLITS)}")

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        # Imported here because scikit-learn takes a second that other sources need not pay.
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        chosen = every_nth_of_class(labels, 5) == (self.split == "held_out")
        pixels = np.round(images * (255 / 16)).astype(np.uint8)
        return pixels.reshape(-1, *self.stored_shape)[chosen], labels[chosen].astype(np.int32)

    def __len__(self) -> int:
        return len(self._arrays[1])

    def held_out(self) -> Digits | None:
        return Digits("held_out") if self.split == "train" else None

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        images, labels = self._arrays
        return {"stored": images[indices], "label": labels[indices]}
