"""Latents as the tools of REPA, SRA and IG-SiT publish them: one .npy file an image.

The layout. `vae-sd/dataset.json` holds {"labels": [[file, class], ...]}; beside it lies a file such
as `00000/img-mean-std-00000000.npy` for every image: float32 (8, h, w), four channels of the mean
and then four of the standard deviation of what the VAE says, neither scaled nor flipped. A zip
holds the same tree, or the inside of `vae-sd`, and is not compressed: a member is a range of bytes
in one memory map.

Examples are in the order of their file names, as in the published loader.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from ig_jax.data import file_tree
from ig_jax.data.file_tree import FileTree
from ig_jax.errors import UserError

ROOT = "vae-sd"
LABELS = "dataset.json"
CHANNELS = 8  # mean, standard deviation
THREADS = 8  # they hide the latency of a disk or network, more than there are cores


class _Header(NamedTuple):
    raw: bytes
    shape: tuple[int, ...]  # (8, h, w)


class _Opened(NamedTuple):
    tree: FileTree
    names: list[str]
    labels: np.ndarray  # int32 [n]
    header: _Header  # of the first file, and most likely of all


@dataclass(frozen=True)
class NpyFolder:
    """float32 [h, w, 8]: mean (4 channels) and standard deviation (4) of an image's latent.

    `path` is the folder that holds `vae-sd`, `vae-sd` itself, or a zip of either. Nothing is read
    before the first use, which lists the files and reads all labels.

    Raises, on first use or from `batch`:
      UserError: something is missing, cut off, of another shape or dtype, not finite, or labelled
        outside of 0..num_classes - 1; names the file.
    """

    path: str
    num_classes: int

    stored_dtype = np.float32

    def __post_init__(self):
        if not self.path:
            raise ValueError(f"path = '': must name the folder or zip that holds {ROOT}/{LABELS}")
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
        if LABELS not in files:
            raise UserError(
                f"{tree.place(LABELS)}: is missing; it gives every file its class, copy it from "
                "where the latents come from"
            )
        labels = _labels(tree, names, self.num_classes)
        return _Opened(tree, names, labels, _header(tree.read(names[0]), tree.place(names[0])))

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        channels, height, width = self._opened.header.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self._opened.names)

    def held_out(self) -> None:
        return None  # the layout knows no split

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        tree, names, labels, header = self._opened
        stored = np.empty((len(indices), *self.stored_shape), self.stored_dtype)
        for index, data, row in zip(indices.tolist(), self._read(indices), stored, strict=True):
            file = tree.place(names[index])
            moments = _moments(data, header, file)
            if not np.isfinite(moments).all():
                raise UserError(f"{file}: holds NaN or infinity; encode this image again")
            row[...] = moments.transpose(1, 2, 0)
        return {"stored": stored, "label": labels[indices]}

    def _read(self, indices: np.ndarray) -> Iterator[bytes]:
        # The threads only wait for files: decoding in them, too, is slower, as they then take turns
        # at the interpreter.
        def files(part: np.ndarray) -> list[bytes]:
            return [tree.read(names[index]) for index in part.tolist()]

        tree, names = self._opened[:2]
        parts = self._readers.map(files, np.array_split(indices, THREADS))
        return itertools.chain.from_iterable(parts)


def _labels(tree: FileTree, names: list[str], num_classes: int) -> np.ndarray:
    """int32 [n], the class of every name."""
    file, label_of = tree.place(LABELS), {}
    for entry in _entries(tree):
        match entry:
            case [str(name), int(label)]:
                label_of[name] = label
            case _:
                raise UserError(f"{file}: entry {entry!r} must be [file, class number]; mend it")
        if not 0 <= label < num_classes:
            raise UserError(
                f"{file}: label {label} of {name} must lie in 0..{num_classes - 1}; raise "
                "num_classes or mend the label"
            )
    unlabelled = [name for name in names if name not in label_of]
    if unlabelled:
        raise UserError(
            f"{file}: {file_tree.some(unlabelled)} not in it; add their labels or remove them"
        )
    if len(label_of) > len(names):
        absent = sorted(label_of.keys() - set(names))
        raise UserError(
            f"{file}: {file_tree.some(absent)} in it but not beside it; copy them again"
        )
    return np.asarray([label_of[name] for name in names], np.int32)


def _entries(tree: FileTree) -> list:
    file = tree.place(LABELS)
    try:
        content = json.loads(tree.read(LABELS))
    except ValueError as error:
        raise UserError(f"{file}: is cut off or no JSON; copy it again") from error
    entries = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(
            f'{file}: must hold {{"labels": [[file, class], ...]}}, but gives no labels; encode '
            "from images that have some"
        )
    return entries


def _header(data: bytes, file: str) -> _Header:
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise UserError(f"{file}: is cut off or no .npy file; copy it again") from error
    if version != (1, 0) or fortran:
        raise UserError(f"{file}: must be .npy version 1.0 in C order; write it again with np.save")
    if dtype != np.float32 or len(shape) != 3 or shape[0] != CHANNELS:
        raise UserError(
            f"{file}: holds {dtype} {shape}, must hold float32 ({CHANNELS}, height, width), mean "
            "and then standard deviation; encode it again"
        )
    return _Header(data[: stream.tell()], shape)


def _moments(data: bytes, first: _Header, file: str) -> Float32[np.ndarray, "8 h w"]:
    # Equal bytes mean equal headers: parsing every one would take longer than reading the file.
    header = first if data.startswith(first.raw) else _header(data, file)
    if header.shape != first.shape:
        raise UserError(
            f"{file}: holds {header.shape}, but the first file holds {first.shape}; encode all "
            "images at one size"
        )
    count = int(np.prod(header.shape))
    if len(data) < len(header.raw) + 4 * count:
        raise UserError(
            f"{file}: is cut off after {len(data)} of {len(header.raw) + 4 * count} bytes; copy it "
            "again"
        )
    return np.frombuffer(data, "<f4", count, len(header.raw)).reshape(header.shape)
