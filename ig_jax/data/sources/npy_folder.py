"""Latents as the tools of REPA, SRA and IG-SiT publish them: one .npy file an image.

The layout. `vae-sd/dataset.json` holds {"labels": [[file, class], ...]}, or {"labels": null} where
there are no classes; beside it lies a file such as `00000/img-mean-std-00000000.npy` for every
image: float32 (8, h, w), four channels of the mean and then four of the standard deviation of what
the VAE says, neither scaled nor flipped. A zip holds the same tree, or the inside of `vae-sd`, and
is not compressed: a member is a range of bytes in one memory map. Beside dataset.json there may be
a record of what made the latents.

Examples are in the order of their file names, as in the published loader.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from ig_jax.data import dataset_json, file_tree, provenance
from ig_jax.data.file_tree import FileTree
from ig_jax.data.provenance import Record, Recorded
from ig_jax.data.read_pool import Readers
from ig_jax.errors import BadExample, UserError, shown
from ig_jax.io import npy
from ig_jax.io.paths import Location

ROOT = "vae-sd"
_CODEC = "sd_vae"  # whose layout this is
CHANNELS = 8  # mean, standard deviation


class _Opened(NamedTuple):
    tree: FileTree
    names: list[str]
    labels: np.ndarray  # int32 [n]
    header: npy.Header  # of the first file, and most likely of all
    raw: bytes  # the same as it is in the file
    record: Record | None


@dataclass(frozen=True)
class NpyFolder(Recorded):
    """float32 [h, w, 8]: mean (4 channels) and standard deviation (4) of an image's latent.

    `path` is the folder that holds `vae-sd`, `vae-sd` itself, or a zip of either. Nothing is read
    before the first use, which lists the files and reads all labels.

    Raises, on first use or from `batch`:
      UserError: something is missing, or labelled outside of 0..num_classes - 1; names the file.
      BadExample: an .npy file is cut off, of another shape or dtype, or not finite; names it.
    """

    path: Location
    num_classes: int

    stored_dtype = np.float32
    _codec_of_layout = _CODEC

    def __post_init__(self):
        if not self.path:
            raise ValueError(
                "path = '': must name the folder or zip that holds "
                f"{ROOT}/{dataset_json.DATASET_JSON}"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes}: must be at least 1")

    @cached_property
    def _opened(self) -> _Opened:
        tree = file_tree.find(Path(self.path), ROOT)
        files = tree.names()
        names = sorted(name for name in files if name.endswith(".npy"))
        if not names:
            raise UserError(
                f"{self.path}: holds no .npy files; path must be a folder or zip of latents, with "
                f"or without {ROOT} in it"
            )
        if dataset_json.DATASET_JSON not in files:
            raise UserError(
                f"{tree.place(dataset_json.DATASET_JSON)}: is missing; it gives every file its "
                "class, copy it from where the latents come from"
            )
        classes = dataset_json.read(tree, names, self.num_classes)
        if classes is None:
            reason = f"{tree.place(dataset_json.DATASET_JSON)}: gives no labels"
            classes = dataset_json.without_classes(len(names), self.num_classes, reason)
        data, file = tree.read(names[0]), tree.place(names[0])
        header = _header(data, file)
        _moments(data, header, file)  # only then is its shape one to make room for
        return _Opened(tree, names, classes, header, data[: header.length], _record(tree, files))

    @cached_property
    def _readers(self) -> Readers:
        return Readers()

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        channels, height, width = self._opened.header.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self._opened.names)

    @property
    def _record(self) -> Record | None:
        return self._opened.record  # inside of the tree, which may be a zip

    def name(self, index: int) -> str:
        """The file below `vae-sd`, with forward slashes."""
        return self._opened.names[index]

    def held_out(self) -> None:
        return None  # the layout knows no split

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        tree, names, classes, first, raw, _ = self._opened
        stored = np.empty((len(indices), *self.stored_shape), self.stored_dtype)
        for index, data, row in zip(indices.tolist(), self._read(indices), stored, strict=True):
            file = tree.place(names[index])
            # Equal bytes mean equal headers: parsing every one would take longer than reading it.
            header = first if data.startswith(raw) else _header(data, file)
            if header.shape != first.shape:
                raise BadExample(
                    f"{file}: holds {header.shape}, but the first file holds {first.shape}; encode "
                    "all images at one size"
                )
            moments = _moments(data, header, file)
            if not np.isfinite(moments).all():
                raise BadExample(f"{file}: holds NaN or infinity; encode this image again")
            row[...] = moments.transpose(1, 2, 0)
        return {"stored": stored, "label": classes[indices]}

    def _read(self, indices: np.ndarray) -> Iterator[bytes]:
        # The threads only wait for files: decoding in them, too, is slower, as they then take turns
        # at the interpreter.
        tree, names = self._opened[:2]
        return self._readers.each(lambda index: tree.read(names[index]), indices)


def _record(tree: FileTree, files: Collection[str]) -> Record | None:
    if provenance.PROVENANCE_FILE not in files:
        return None
    return provenance.parse(
        tree.read(provenance.PROVENANCE_FILE), tree.place(provenance.PROVENANCE_FILE)
    )


def _header(data: bytes, file: str) -> npy.Header:
    """The header of one of the files; whether the rest of the file is as long as it says is open.

    Raises:
      BadExample: there is none, or it is of something else.
    """
    try:
        header = npy.header(data)
    except ValueError as error:
        raise BadExample(f"{file}: is cut off or no .npy file ({error}); copy it again") from error
    if header.version != 1 or header.fortran:
        raise BadExample(
            f"{file}: must be .npy version 1.0 in C order; write it again with np.save"
        )
    shape = header.shape
    if header.dtype != np.float32 or len(shape) != 3 or shape[0] != CHANNELS or 0 in shape:
        raise BadExample(
            f"{file}: holds {header.dtype} {shown(shape)}, must hold float32 ({CHANNELS}, height, "
            "width), mean and then standard deviation; encode it again"
        )
    return header


def _moments(data: bytes, header: npy.Header, file: str) -> Float32[np.ndarray, "8 h w"]:
    try:
        return header.view(data)
    except ValueError as error:
        raise BadExample(f"{file}: is cut off or too long ({error}); copy it again") from error
