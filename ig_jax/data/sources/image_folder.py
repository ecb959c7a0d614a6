"""Images below one folder a class, as ImageNet is unpacked; or as the published tools store them.

The layout. `<class>/<anything>.jpg`, where the classes are numbered in the order of their names; or
images anywhere below the root and a `dataset.json` that gives their classes (`data/labels.py`);
or images without classes, in no folder or with a `dataset.json` that says so. The root is a
folder, the folder `images` in it, or an uncompressed zip of either.

Examples are in the order of their file names, as in the published tools.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from ig_jax.bounds import at_most
from ig_jax.data import crop, dataset_json, file_tree
from ig_jax.data.crop import Cropped
from ig_jax.data.file_tree import FileTree, Folder
from ig_jax.errors import UserError, shown
from ig_jax.io import images
from ig_jax.io.paths import Location

MOST_CLASSES = 2**24  # each has a row in a table
_ROOT = "images"
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # folders above


class _Classes(NamedTuple):
    labels: Int32[np.ndarray, "n"]
    about: str  # '3 classes, 'cat' to 'eel''


class _Opened(NamedTuple):
    tree: FileTree
    names: list[str]
    classes: _Classes


class _Listed(NamedTuple):
    tree: FileTree
    all: Collection[str]
    images: list[str]  # in order


def _list(path: str) -> _Listed:
    tree = file_tree.find(Path(path), _ROOT)
    listed = tree.names()
    names = sorted(name for name in listed if images.is_image(name))
    if not names:
        raise UserError(
            f"{path}: holds no images ({', '.join(images.FORMATS)}); path must be a folder or zip "
            "of them"
        )
    return _Listed(tree, listed, names)


def _first_folders(names: list[str]) -> list[str]:
    return sorted({name.split("/", 1)[0] for name in names})


def count_classes(path: Location) -> int:
    """Classes of the images in a folder or zip: of dataset.json, or folders; 1 without any.

    Raises:
      UserError: there are no images, or dataset.json is damaged; names the place.
    """
    tree, listed, names = _list(path)
    if dataset_json.DATASET_JSON in listed:
        labels = dataset_json.read(tree, names, MOST_CLASSES)
        return 1 if labels is None else int(labels.max()) + 1
    return 1 if all("/" not in name for name in names) else len(_first_folders(names))


@dataclass(frozen=True)
class ImageFolder(Cropped):
    """uint8 [size, size, 3]: images cropped by `crop.center_crop`, with their classes.

    `path` is the folder or zip of the images. Nothing is read before the first use, which lists
    the files. Where images have no classes, `num_classes` must be 1 and all labels are 0.

    Raises, on first use or from `batch`:
      UserError: there are no images, a class has none, or the classes are not `num_classes`;
        names the place.
      BadExample: an image cannot be decoded; names the file.
    """

    path: Location
    size: int = at_most(crop.LARGEST_SIDE)  # side of the cropped images
    num_classes: int
    fewer_classes: bool = False  # whether there may be fewer folders than `num_classes`

    def __post_init__(self):
        if not self.path:
            raise ValueError("path = '': must name the folder or zip of the images")
        super().__post_init__()

    @cached_property
    def _opened(self) -> _Opened:
        tree, listed, names = _list(self.path)
        return _Opened(tree, names, self._classes(tree, names, listed))

    def _classes(self, tree: FileTree, names: list[str], listed: Collection[str]) -> _Classes:
        if dataset_json.DATASET_JSON in listed:
            given = dataset_json.read(tree, names, self.num_classes)
            if given is None:
                return self._without(
                    names, f"{tree.place(dataset_json.DATASET_JSON)}: gives no labels"
                )
            return _Classes(
                given, f"{len(np.unique(given))} classes of {dataset_json.DATASET_JSON}"
            )
        loose = [name for name in names if "/" not in name]
        if len(loose) == len(names):
            without = f"in no folder and no {dataset_json.DATASET_JSON}, so no classes"
            reason = f"{self.path}: holds images {without}"
            return self._without(names, reason)
        if loose:
            raise UserError(
                f"{self.path}: {file_tree.some(loose)} in no folder, so of no class, but others "
                f"are; put them into folders, or give all classes in {dataset_json.DATASET_JSON}"
            )
        return self._folders(tree, names, listed)

    def _without(self, names: list[str], reason: str) -> _Classes:
        return _Classes(
            dataset_json.without_classes(len(names), self.num_classes, reason), "no classes"
        )

    def _folders(self, tree: FileTree, names: list[str], listed: Collection[str]) -> _Classes:
        """The place of every image's first folder among the sorted first folders."""
        of_names = [name.split("/", 1)[0] for name in names]
        folders = _first_folders(names)
        empty = sorted({n.split("/", 1)[0] for n in listed if "/" in n} - set(folders))
        if empty:
            raise UserError(
                f"{self.path}: {file_tree.some(empty)} without images, but every folder is a "
                "class; remove folders that are none, or restore their images"
            )
        numbers = {folder: number for number, folder in enumerate(folders)}
        self._check_number(tree, folders)
        about = f"{len(folders):,} classes, {shown(folders[0])} to {shown(folders[-1])}"
        if len(folders) == 1:
            about = f"1 class, {shown(folders[0])}"
        return _Classes(np.asarray([numbers[folder] for folder in of_names], np.int32), about)

    def _check_number(self, tree: FileTree, folders: list[str]) -> None:
        found = len(folders)
        if found == self.num_classes or (found < self.num_classes and self.fewer_classes):
            return
        contents = f"the folder {folders[0]}" if found == 1 else f"{found:,} folders of images"
        ways = [f"set num_classes = {found}"]
        if isinstance(tree, Folder) and {folder.lower() for folder in folders} <= _SPLITS:
            ways.insert(0, f"name one of them in path ({tree.place(folders[0])})")
        if found < self.num_classes:
            ways.append("allow it with fewer_classes = True")
        else:
            ways.append(
                f'write {{"labels": null}} to {dataset_json.DATASET_JSON} to train without classes'
            )
        raise UserError(
            f"{self.path}: holds {contents}, each a class, but num_classes = {self.num_classes}; "
            f"{', or '.join(ways)}"
        )

    def unlabelled(self) -> ImageFolder:
        """The same images, whatever their folders, all of class 0."""
        return _Unlabelled(self.path, self.size, 1)

    def summary(self) -> str:
        """Number of images and classes, in a line."""
        return f"{len(self):,} images, {self._opened.classes.about}, in {self.path}"

    @property
    def labels(self) -> Int32[np.ndarray, "n"]:
        """The class of every image."""
        return self._opened.classes.labels

    def __len__(self) -> int:
        return len(self._opened.names)

    def name(self, index: int) -> str:
        """The file below the root, with forward slashes."""
        return self._opened.names[index]

    def held_out(self) -> None:
        return None  # the layout has a folder per split, and each is a source of its own

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        stored = self._stacked(self._image, indices.tolist())
        return {"stored": stored, "label": self.labels[indices]}

    def _image(self, index: int) -> np.ndarray:
        tree, names, _ = self._opened
        return crop.decode(tree.read(names[index]), self.size, tree.place(names[index]))


class _Unlabelled(ImageFolder):
    def _classes(self, tree: FileTree, names: list[str], listed: Collection[str]) -> _Classes:
        return self._without(names, "")
