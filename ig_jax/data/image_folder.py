"""Pictures below one folder a class, as ImageNet is unpacked; or as the published tools store them.

The layout. `<class>/<anything>.jpg`, where the classes are numbered in the order of their names; or
pictures anywhere below the root and a `dataset.json` that gives their classes (`data/labels.py`).
The root is a folder, the folder `images` in it, or an uncompressed zip of either.

Examples are in the order of their file names, as in the published tools.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ig_jax.bounds import at_most
from ig_jax.data import crop, file_tree, labels
from ig_jax.data.crop import Cropped
from ig_jax.data.file_tree import FileTree
from ig_jax.errors import UserError

ROOT = "images"


class _Opened(NamedTuple):
    tree: FileTree
    names: list[str]
    labels: np.ndarray  # int32 [n]


@dataclass(frozen=True)
class ImageFolder(Cropped):
    """uint8 [size, size, 3]: pictures cropped by `crop.center_crop`, with their classes.

    `path` is the folder or zip of the pictures. Nothing is read before the first use, which lists
    the files.

    Raises, on first use or from `batch`:
      UserError: there are no pictures, or their classes are missing or too many; names the place.
      BadExample: a picture cannot be decoded; names the file.
    """

    path: str
    size: int = at_most(crop.LARGEST)  # side of the cropped pictures
    num_classes: int

    def __post_init__(self):
        if not self.path:
            raise ValueError("path = '': must name the folder or zip of the pictures")
        super().__post_init__()

    @cached_property
    def _opened(self) -> _Opened:
        tree = file_tree.find(Path(self.path), ROOT)
        files = tree.names()
        known = Image.registered_extensions()
        names = sorted(name for name in files if os.path.splitext(name)[1].lower() in known)
        if not names:
            raise UserError(
                f"{self.path}: holds no pictures; path must be a folder or zip with one folder a "
                f"class, or with pictures and {labels.FILE}"
            )
        if labels.FILE in files:
            return _Opened(tree, names, labels.read(tree, names, self.num_classes))
        return _Opened(tree, names, _number_of_folder(self.path, names, self.num_classes))

    def __len__(self) -> int:
        return len(self._opened.names)

    def name(self, index: int) -> str:
        """The file below the root, with forward slashes."""
        return self._opened.names[index]

    def held_out(self) -> None:
        return None  # the layout has a folder per split, and each is a source of its own

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        stored = self._stacked(self._picture, indices.tolist())
        return {"stored": stored, "label": self._opened.labels[indices]}

    def _picture(self, index: int) -> np.ndarray:
        tree, names, _ = self._opened
        return crop.decode(tree.read(names[index]), self.size, tree.place(names[index]))


def _number_of_folder(path: str, names: list[str], num_classes: int) -> np.ndarray:
    """int32 [n]: the place of every picture's first folder among the sorted first folders."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise UserError(
            f"{path}: {file_tree.some(loose)} in no folder, so of no class; put them into folders "
            f"or give the classes in {labels.FILE}"
        )
    folders = [name.split("/", 1)[0] for name in names]
    numbers = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    if len(numbers) < 2:
        raise UserError(
            f"{path}: holds pictures in the folder {folders[0]} only; there must be one folder a "
            f"class, or a {labels.FILE}"
        )
    if len(numbers) > num_classes:
        raise UserError(
            f"{path}: holds {len(numbers)} folders of pictures, but num_classes = {num_classes}; "
            "raise num_classes or remove folders"
        )
    return np.asarray([numbers[folder] for folder in folders], np.int32)
