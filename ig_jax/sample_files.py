"""What a sampling run leaves behind: numbered PNG files, one array of all, and a grid to look at.

Both kinds grow while samples are drawn, and tell which samples they hold already. The array is an
.npz as ADM's evaluator reads it; until it is whole its rows are in a hidden folder beside it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from ig_jax import pictures
from ig_jax.errors import UserError
from ig_jax.formats import digests, files, npz
from ig_jax.formats.row_store import Row, RowStore

ARCHIVE = "samples.npz"
IMAGES, LABELS = "arr_0", "arr_1"  # as ADM names them
SHOWN, COLUMNS = 100, 10  # of the grid
WRITERS = 8  # PNG files compressed at the same time
PNG_END = b"IEND\xaeB`\x82"
COPIED = 256  # samples at a time

Pictures = UInt8[np.ndarray, "n h w c"]
Indices = Int[np.ndarray, "n"]


@runtime_checkable
class Kind(Protocol):
    """One way of keeping samples."""

    def holds(self, indices: Indices) -> Bool[np.ndarray, "n"]: ...

    def read(self, indices: Indices) -> Pictures: ...

    def write(self, indices: Indices, images: Pictures) -> None: ...


def _copy(read: Callable[[Indices], Pictures], to: Kind, indices: Indices) -> None:
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
        """Whether each file is there and whole: one that a crash or a copy cut is made again."""
        return np.array(list(self._writers.map(self._is_whole, indices.tolist())), bool)

    def _is_whole(self, index: int) -> bool:
        file = self._file(index)
        if not file.is_file():
            return False
        content = files.read_bytes(file)
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                height, width, _ = self._shape
                if image.size != (width, height) or image.mode != "RGB":
                    return False
                image.verify()  # the checksums of all parts, without decoding them
            return content.endswith(PNG_END)  # which Pillow does not look at
        except (OSError, ValueError, SyntaxError):  # as Pillow tells of damage
            return False

    def read(self, indices: Indices) -> Pictures:
        load = self._writers.map
        found = map(self._file, indices.tolist())
        return np.stack(list(load(lambda file: pictures.load(file, self._shape[-1]), found)))

    def write(self, indices: Indices, images: Pictures) -> None:
        list(self._writers.map(pictures.save, map(self._file, indices.tolist()), images))


class Archive:
    """samples.npz: all pictures and their labels."""

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
        """The pictures of samples.npz; None if it is not there, or damaged: it is made again."""
        try:
            if not self.file.exists():
                return None
            found, labels = (npz.array(self.file, name) for name in (IMAGES, LABELS))
        except UserError:
            return None
        ours = found.dtype == np.uint8 and found.shape == (len(labels), *self._shape)
        return found if ours else None

    def whole(self) -> bool:
        """Whether samples.npz is there, with at least as many samples as are asked for."""
        images = self._images()
        return images is not None and len(images) >= self._num

    def holds(self, indices: Indices) -> Bool[np.ndarray, "n"]:
        return np.ones(len(indices), bool) if self.whole() else self._store.done(indices)

    def read(self, indices: Indices) -> Pictures:
        found = npz.array(self.file, IMAGES) if self.whole() else self._store.read(IMAGES)
        return np.asarray(found[indices])

    def write(self, indices: Indices, images: Pictures) -> None:
        self._store.write(indices, {IMAGES: images})

    def finish(self, labels: np.ndarray) -> None:
        """Makes samples.npz of the rows, without ever holding all of them."""
        if not self.whole():
            npz.write(self.file, {IMAGES: self._store.path(IMAGES), LABELS: labels})
        self._store.remove()


class Found:
    """Samples that somebody drew: an .npz with arr_0 (and labels in arr_1), or a folder of PNG."""

    def __init__(self, path: Path, field: str, channels: int = 3):
        """
        Args:
          path: of the file or folder.
          field: what named it, for the messages.
          channels: 1 for PNG files that are meant to be grey.

        Raises:
          UserError: it holds no uint8 pictures.
        """
        self.path, self.labels, self._channels = path, None, channels
        self._files = sorted(f for f in path.glob("*.png") if f.stem.isdigit())
        if path.is_dir():
            if not self._files:
                raise UserError(f"{field} = {str(path)!r}: holds no 000000.png, 000001.png, ...")
            with Image.open(self._files[0]) as first:
                self.shape = (first.height, first.width, channels)
            return
        try:
            self._array = npz.array(path, IMAGES)
        except UserError as refusal:
            raise UserError(f"{field} = {refusal}") from None
        if self._array.dtype != np.uint8 or self._array.ndim != 4:
            raise UserError(
                f"{field} = {str(path)!r}: {IMAGES} is {self._array.dtype} of shape "
                f"{self._array.shape}; must be pictures, uint8 [n, h, w, c]"
            )
        self.shape = self._array.shape[1:]
        if LABELS in npz.names(path):
            self.labels = np.array(npz.array(path, LABELS))

    def __len__(self) -> int:
        return len(self._files) or len(self._array)

    def read(self, indices: Indices) -> Pictures:
        """Raises UserError where pictures have different sizes."""
        if not self._files:
            return np.asarray(self._array[indices])
        images = [pictures.load(self._files[i], self._channels) for i in indices.tolist()]
        for index, image in zip(indices.tolist(), images, strict=True):
            if image.shape != self.shape:
                raise UserError(
                    f"{self._files[index]}: is {image.shape[1]} x {image.shape[0]} pixels, but "
                    f"{self._files[0].name} is {self.shape[1]} x {self.shape[0]}; judge pictures "
                    "of one size"
                )
        return np.stack(images)

    def digest(self) -> str:
        """SHA-256 of those of all files, in order."""
        found = hashlib.sha256()
        for file in self._files or [self.path]:
            found.update(bytes.fromhex(digests.of_file(file)))
        return found.hexdigest()


class SampleFiles:
    """The files of `num` samples of one `shape` [h, w, c] in `target`, of the given kinds.

    The folder is there, and no other program works in it.
    """

    def __init__(self, target: Path, num: int, shape: tuple[int, ...], kinds: tuple[str, ...]):
        self._target, self._num = target, num
        self.archive = Archive(target, num, shape) if "npz" in kinds else None
        png = PngFiles(target, shape) if "png" in kinds else None
        self._kinds: list[Kind] = [kind for kind in (png, self.archive) if kind is not None]

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

    def write(self, indices: Indices, images: Pictures) -> None:
        for kind in self._kinds:
            kind.write(indices, images)

    def finish(self, labels: np.ndarray) -> list[str]:
        """Makes the array and grid.png once every sample is written; returns what there is."""
        shown = min(self._num, SHOWN)
        images = self._kinds[0].read(np.arange(shown))
        columns = min(COLUMNS, shown)
        grid = pictures.grid(images, columns, labels[:shown].tolist())
        pictures.save(self._target / "grid.png", grid)
        if self.archive is None:
            return ["PNG", "grid.png"]
        self.archive.finish(labels)
        return [*(["PNG"] if len(self._kinds) > 1 else []), "grid.png", ARCHIVE]
