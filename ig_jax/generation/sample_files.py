"""Files of a sampling run: numbered PNG files, one array of all, and an image grid.

Both kinds grow while samples are drawn, and tell which samples they hold already. The array is an
.npz as ADM's evaluator reads it; until it is whole its rows are in a hidden folder beside it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from ig_jax.data import file_tree
from ig_jax.errors import UserError
from ig_jax.io import images as image_files
from ig_jax.io import npz
from ig_jax.io.files import read_bytes, sha256
from ig_jax.io.row_store import Row, RowStore
from ig_jax.plots import image_grid

ARCHIVE, _GRID = "samples.npz", "grid.png"
SETTINGS = "settings.json"  # beside them, of the run that drew them
NUMBERED = re.compile(r"[0-9]{6,}\.png")
IMAGES, _LABELS = "arr_0", "arr_1"  # as ADM names them
_SHOWN, _COLUMNS = 100, 10  # of the grid
WRITERS = 8  # PNG files compressed at the same time
PNG_END = b"IEND\xaeB`\x82"
COPIED = 256  # samples at a time

ImageArray = UInt8[np.ndarray, "n h w c"]
Indices = Int[np.ndarray, "n"]


@runtime_checkable
class FileKind(Protocol):
    """One way of keeping samples."""

    def holds(self, indices: Indices) -> Bool[np.ndarray, "n"]: ...

    def read(self, indices: Indices) -> ImageArray: ...

    def write(self, indices: Indices, images: ImageArray) -> None: ...


def _copy(read: Callable[[Indices], ImageArray], to: FileKind, indices: Indices) -> None:
    for start in range(0, len(indices), COPIED):
        part = indices[start : start + COPIED]
        to.write(part, read(part))


class PngFiles:
    """000000.png, 000001.png, ..."""

    def __init__(self, target: Path, shape: tuple[int, ...]):
        self._target, self._shape = target, shape
        self._writers = ThreadPoolExecutor(WRITERS)

    def _file(self, index: int) -> Path:
        return self._target / f"{index:06d}.png"

    def holds(self, indices: Indices) -> Bool[np.ndarray, "n"]:
        """Returns which files are there and whole: one that a crash or a copy cut is made again."""
        return np.array(list(self._writers.map(self._is_whole, indices.tolist())), bool)

    def _is_whole(self, index: int) -> bool:
        file = self._file(index)
        if not file.is_file():
            return False
        content = read_bytes(file)
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                height, width, _ = self._shape
                if image.size != (width, height) or image.mode != "RGB":
                    return False
                image.verify()  # the checksums of all parts, without decoding them
            return content.endswith(PNG_END)  # which Pillow does not look at
        except (OSError, ValueError, SyntaxError):  # as Pillow tells of damage
            return False

    def read(self, indices: Indices) -> ImageArray:
        load = self._writers.map
        found = map(self._file, indices.tolist())
        return np.stack(list(load(lambda file: image_grid.load(file, self._shape[-1]), found)))

    def write(self, indices: Indices, images: ImageArray) -> None:
        list(self._writers.map(image_grid.save, map(self._file, indices.tolist()), images))


class Archive:
    """samples.npz: all images and their labels."""

    def __init__(self, target: Path, num: int, shape: tuple[int, ...]):
        self.file = target / ARCHIVE
        self._num, self._shape = num, shape
        self._store = RowStore(target / f".samples-{num}", num, {IMAGES: Row(shape, np.uint8)})

    def create(self) -> None:
        """One process does it, before any writes; what a smaller samples.npz holds is kept."""
        if self.whole():
            return
        self._store.create()
        old = self._images()
        if old is not None:
            _copy(old.__getitem__, self, np.arange(len(old)))

    def _images(self) -> np.ndarray | None:
        """The images of samples.npz; None if it is not there, or damaged: it is made again."""
        try:
            if not self.file.exists():
                return None
            found, labels = (npz.read_array(self.file, name) for name in (IMAGES, _LABELS))
        except UserError:
            return None
        ours = found.dtype == np.uint8 and found.shape == (len(labels), *self._shape)
        return found if ours else None

    def whole(self) -> bool:
        """Returns whether samples.npz is there, with at least as many samples as are asked for."""
        images = self._images()
        return images is not None and len(images) >= self._num

    def holds(self, indices: Indices) -> Bool[np.ndarray, "n"]:
        return np.ones(len(indices), bool) if self.whole() else self._store.done(indices)

    def read(self, indices: Indices) -> ImageArray:
        found = npz.read_array(self.file, IMAGES) if self.whole() else self._store.read(IMAGES)
        return np.asarray(found[indices])

    def write(self, indices: Indices, images: ImageArray) -> None:
        self._store.write(indices, {IMAGES: images})

    def finish(self, labels: np.ndarray) -> None:
        """Makes samples.npz of the rows, without ever holding all of them."""
        if not self.whole():
            npz.write(self.file, {IMAGES: self._store.path(IMAGES), _LABELS: labels})
        self._store.remove()


class SavedSamples:
    """Samples that somebody drew: an .npz with arr_0 (and labels in arr_1), or a folder of images.

    Images are in the natural order of their names: 2.png before 10.png. Of a folder that a sampling
    run filled, only the samples count.
    """

    def __init__(self, path: Path, field: str, channels: int = 3):
        """
        Args:
          path: of the file or folder.
          field: what named it, for the messages.
          channels: 1 for image files that are meant to be grey.

        Raises:
          UserError: it holds no uint8 images, images of different sizes or damaged ones, or
            labels that are not one for each.
        """
        self.path, self.labels, self._channels = path, None, channels
        self._files: list[Path] = []
        self.left_out: list[str] = []  # names in the folder that are no samples
        try:
            if os.path.isdir(path):
                self._open_folder()
            else:
                self._open_archive()
        except UserError as refusal:
            raise UserError(f"{field} = {refusal}") from None

    def _open_folder(self) -> None:
        try:
            listed = os.listdir(self.path)
        except OSError as error:
            raise UserError(
                f"{str(self.path)!r}: cannot be listed ({error.strerror}); restore the right to "
                "read it"
            ) from error
        names = sorted((name for name in listed if not name.startswith(".")), key=_natural)
        chosen_files = [name for name in names if image_files.is_image(name)]
        own = [name for name in chosen_files if NUMBERED.fullmatch(name)]
        written: set[str] = set()
        if own and (self.path / SETTINGS).exists():
            chosen_files, written = own, {SETTINGS, _GRID, ARCHIVE}
        if not chosen_files:
            raise UserError(
                f"{str(self.path)!r}: holds no images ({', '.join(image_files.FORMATS)}); name the "
                "folder that they lie in"
            )
        self._files = [self.path / name for name in chosen_files]
        self.left_out = [name for name in names if name not in written | set(chosen_files)]
        width, height = self._one_size()
        self.shape = (height, width, self._channels)

    def _one_size(self) -> tuple[int, int]:
        """Width and height of all images, by how they begin: hours before the last is evaluated."""
        with ThreadPoolExecutor(WRITERS) as readers:
            sizes = list(readers.map(_size, self._files))
        bad = [size for size in sizes if isinstance(size, UserError)]
        if bad:
            others = f"; {len(bad) - 1:,} others are damaged, too" if len(bad) > 1 else ""
            raise UserError(f"{bad[0]}{others}")
        for file, size in zip(self._files, sizes, strict=True):
            if size != sizes[0]:
                raise UserError(
                    f"{file}: is {size[0]} x {size[1]} pixels, but {self._files[0].name} is "
                    f"{sizes[0][0]} x {sizes[0][1]}; evaluate images of one size"
                )
        return sizes[0]

    def _open_archive(self) -> None:
        self._array = npz.read_array(self.path, IMAGES)
        dtype, shape = self._array.dtype, self._array.shape
        if dtype != np.uint8 or len(shape) != 4 or 0 in shape[1:]:
            raise UserError(
                f"{str(self.path)!r}: {IMAGES} is {dtype} of shape {shape}; must be images, "
                "uint8 [n, h, w, c]"
            )
        if shape[3] not in (1, 3):
            swap = f"; write {IMAGES}.transpose(0, 2, 3, 1)" if shape[1] in (1, 3) else ""
            raise UserError(
                f"{str(self.path)!r}: {IMAGES} has the shape {shape}, but channels (1 or 3) must "
                f"come last, [n, h, w, c]{swap}"
            )
        self.shape = shape[1:]
        if _LABELS in npz.names(self.path):
            self.labels = np.array(npz.read_array(self.path, _LABELS))
            if self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iu":
                raise UserError(
                    f"{str(self.path)!r}: {_LABELS} is {self.labels.dtype} of shape "
                    f"{self.labels.shape}; must be the class of each of the {shape[0]:,} images, "
                    "integers [n], or not be there"
                )

    def __len__(self) -> int:
        return len(self._files) or len(self._array)

    def remark(self) -> str:
        """A line that names the files of the folder that are left out."""
        left, files = len(self.left_out), len(self) + len(self.left_out)
        names = file_tree.list_names(self.left_out)
        return f"{self.path}: {left:,} of {files:,} files are not evaluated: {names}"

    def read(self, indices: Indices) -> ImageArray:
        """Raises UserError where an image is damaged."""
        if not self._files:
            return np.asarray(self._array[indices])
        return np.stack([image_grid.load(self._files[i], self._channels) for i in indices.tolist()])

    def digest(self) -> str:
        """SHA-256 of those of all files, in order."""
        found = hashlib.sha256()
        for file in self._files or [self.path]:
            found.update(bytes.fromhex(sha256(file)))
        return found.hexdigest()


def _natural(name: str) -> tuple[list[str | int], str]:
    """By the numbers in a name and the text between them; equal numbers by how they are written."""
    parts = re.split("([0-9]+)", name)  # text at even places, numbers at odd ones
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _size(file: Path) -> tuple[int, int] | UserError:
    try:
        return image_files.size_of(file)
    except UserError as error:
        return error


class SampleWriter:
    """The files of `num` samples of one `shape` [h, w, c] in `target`, of the given kinds.

    The folder is there, and no other program works in it.
    """

    def __init__(self, target: Path, num: int, shape: tuple[int, ...], kinds: tuple[str, ...]):
        self._target, self._num = target, num
        self.archive = Archive(target, num, shape) if "npz" in kinds else None
        png = PngFiles(target, shape) if "png" in kinds else None
        self._kinds: list[FileKind] = [kind for kind in (png, self.archive) if kind is not None]

    def create(self) -> None:
        """One process does it, before any asks or writes."""
        if self.archive is not None:
            self.archive.create()

    def missing(self, indices: Indices) -> Int[np.ndarray, "m"]:
        """Those of `indices` that no file holds; what one kind holds is copied to the other."""
        held = [kind.holds(indices) for kind in self._kinds]
        anywhere = np.logical_or.reduce(held)
        for kind, own in zip(self._kinds, held, strict=True):
            for other, there in zip(self._kinds, held, strict=True):
                _copy(other.read, kind, indices[there & ~own])
        return indices[~anywhere]

    def write(self, indices: Indices, images: ImageArray) -> None:
        for kind in self._kinds:
            kind.write(indices, images)

    def finish(self, labels: np.ndarray) -> list[str]:
        """Makes the array and grid.png once every sample is written; returns what there is."""
        shown = min(self._num, _SHOWN)
        first = self._kinds[0].read(np.arange(shown))
        columns = min(_COLUMNS, shown)
        grid = image_grid.grid(first, columns, labels[:shown].tolist())
        image_grid.save(self._target / _GRID, grid)
        if self.archive is None:
            return ["PNG", _GRID]
        self.archive.finish(labels)
        return [*(["PNG"] if len(self._kinds) > 1 else []), _GRID, ARCHIVE]
