"""Anybody's images: a folder or zip of them, in class folders or loose, a share held out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ig_jax.bounds import at_most, unset
from ig_jax.data import crop
from ig_jax.data.sources.image_folder import ImageFolder, count_classes
from ig_jax.errors import UserError, shown
from ig_jax.io.paths import Location

_SPLITS = ("train", "held_out")
_SEED = 0  # of the order by which images of a class are held out
_MOST_KEPT = 2**30  # bytes of cropped images in memory


class _Kept(NamedTuple):
    stored: np.ndarray
    known: np.ndarray  # [n] of bool


class _Opened(NamedTuple):
    images: ImageFolder
    chosen: np.ndarray  # indices of this split


@dataclass(frozen=True)
class OwnImages:
    """uint8 [size, size, 3]: images cropped by `crop.center_crop`; their classes are counted.

    Layouts are those of `ImageFolder`; images without classes are all of class 0. Of each class the
    share `held_out_share` is held out, rounded down. Where all of them take up to 1 GiB, each is
    decoded once and kept in memory.

    Raises, on first use or from `batch`:
      UserError: there are no images, or too few of them; names the place.
      BadExample: an image cannot be decoded; names the file.
    """

    path: Location | None = unset("")
    size: int = at_most(crop.LARGEST_SIDE)  # side of the cropped images
    split: str = "train"
    held_out_share: float = 0.1

    stored_dtype = np.uint8

    def __post_init__(self):
        if self.path is None:
            raise ValueError("path = None: must name the folder or zip of your images")
        if self.size < 1:
            raise ValueError(f"size = {self.size}: must be at least 1")
        if self.split not in _SPLITS:
            raise ValueError(f"split = {shown(self.split)}: must be one of {', '.join(_SPLITS)}")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share = {self.held_out_share}: must lie in [0, 1)")

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @cached_property
    def num_classes(self) -> int:
        return count_classes(self.path)

    @cached_property
    def _opened(self) -> _Opened:
        images = ImageFolder(self.path, self.size, self.num_classes, fewer_classes=True)
        held_out = np.zeros(len(images), bool)
        order = np.random.default_rng(_SEED).permutation(len(images))
        labels = images.labels[order]
        for label in range(self.num_classes):
            of_class = order[labels == label]
            held_out[of_class[: math.floor(self.held_out_share * len(of_class))]] = True
        chosen = np.flatnonzero(held_out == (self.split == "held_out"))
        if not len(chosen):
            raise UserError(
                f"{self.path}: {len(images)} images in {self.num_classes} classes are too few for "
                f"held_out_share = {self.held_out_share} to hold any out; raise it"
            )
        return _Opened(images, chosen)

    @cached_property
    def _kept(self) -> _Kept | None:
        """Images of this split that have been decoded; None where they are too many to keep."""
        if len(self) * math.prod(self.stored_shape) > _MOST_KEPT:
            return None
        stored = np.empty((len(self), *self.stored_shape), np.uint8)
        return _Kept(stored, np.zeros(len(self), bool))

    def summary(self) -> str:
        """Number of images and classes, in a line."""
        images, chosen = self._opened
        rest = len(images) - len(chosen)
        return f"{images.summary()}; {len(chosen):,} to train on, {rest:,} held out"

    def __len__(self) -> int:
        return len(self._opened.chosen)

    def name(self, index: int) -> str:
        """The file below the root, with forward slashes."""
        images, chosen = self._opened
        return images.name(int(chosen[index]))

    def held_out(self) -> OwnImages | None:
        """The held-out images; None where the share of every class is less than one."""
        if self.split == "held_out":
            return None
        images, chosen = self._opened
        return replace(self, split="held_out") if len(chosen) < len(images) else None

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        images, chosen = self._opened
        if self._kept is None:
            return images.batch(chosen[indices])
        stored, known = self._kept
        missing = np.unique(indices[~known[indices]])
        if len(missing):
            stored[missing] = images.batch(chosen[missing])["stored"]
            known[missing] = True  # last: another thread may look
        return {"stored": stored[indices], "label": images.labels[chosen[indices]]}
