"""Latents as LightningDiT publishes them: shards that hold every latent and its flipped copy.

The layout. A folder of `latents_rank00_shard000.safetensors` and so on, each with float32 `latents`
and `latents_flip` [n, c, h, w] and int64 `labels` [n]. The two are draws from what the VAE says of
an image and of its mirror image, not yet normalised. Examples are in the order of the file names,
as in the published loader.

An example is both twins, one behind the other in the channels. The choice between them is random
and is therefore the codec's, who has a key made from the run's seed; the published loader draws it
on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ig_jax.data.provenance import Recorded
from ig_jax.errors import LONGEST_SHOWN, BadExample, UserError
from ig_jax.io import safetensors_file
from ig_jax.io.paths import Location

_CODEC = "va_vae"  # whose layout this is
TENSORS = {"latents": "F32", "latents_flip": "F32", "labels": "I64"}  # as the format calls dtypes
SHARD_DTYPES = {"F32": "<f4", "I64": "<i8"}  # as numpy calls them


class _Shard(NamedTuple):
    """Views of one memory map, which stays open as long as they live."""

    file: Path
    latents: np.ndarray  # float32 [n, c, h, w]
    flipped: np.ndarray  # alike
    labels: np.ndarray  # int64 [n]


class _Opened(NamedTuple):
    shards: list[_Shard]
    starts: np.ndarray  # [shards]: index of the first example of each
    labels: np.ndarray  # int32 [n], of all shards


@dataclass(frozen=True)
class SafetensorsShards(Recorded):
    """float32 [h, w, 2c]: the latent (c channels) and then its flipped copy (c).

    `path` is the folder of the shards. Nothing is read before the first use, which maps all shards
    into memory and reads all labels.

    Raises, on first use or from `batch`:
      UserError: something is missing, cut off, of another shape or dtype, or labelled outside of
        0..num_classes - 1; names the file.
      BadExample: a latent is not finite; names its file and place.
    """

    path: Location
    num_classes: int

    stored_dtype = np.float32
    _codec_of_layout = _CODEC

    def __post_init__(self):
        if not self.path:
            raise ValueError("path = '': must name the folder of the .safetensors files")
        if self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes}: must be at least 1")

    @cached_property
    def _opened(self) -> _Opened:
        shards = [_shard(file) for file in _files(Path(self.path))]
        for shard in shards:
            _check_shapes(shard, shards[0])
            _check_labels(shard, self.num_classes)
        sizes = [len(shard.labels) for shard in shards]
        if not sum(sizes):
            raise UserError(f"{self.path}: its shards hold no latents; extract them again")
        labels = np.concatenate([shard.labels for shard in shards]).astype(np.int32)
        return _Opened(shards, np.cumsum([0, *sizes[:-1]]), labels)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self._opened.shards[0].latents.shape
        return height, width, 2 * channels

    def __len__(self) -> int:
        return len(self._opened.labels)

    def name(self, index: int) -> str:
        """'latents_rank00_shard000.safetensors:17', the shard and the place in it."""
        shards, starts, _ = self._opened
        owner = int(np.searchsorted(starts, index, side="right")) - 1
        return f"{shards[owner].file.name}:{index - starts[owner]}"

    def held_out(self) -> None:
        return None  # the layout has a folder per split, and each is a source of its own

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        shards, starts, labels = self._opened
        stored = np.empty((len(indices), *self.stored_shape), self.stored_dtype)
        owners = np.searchsorted(starts, indices, side="right") - 1
        places = zip(owners.tolist(), (indices - starts[owners]).tolist(), strict=True)
        for (owner, place), row in zip(places, stored, strict=True):
            _read(shards[owner], place, row)
        return {"stored": stored, "label": labels[indices]}


def _read(shard: _Shard, place: int, out: np.ndarray) -> None:
    """Latent and twin number `place` of the shard, channels last, to `out` [h, w, 2c]."""
    both = [shard.latents[place], shard.flipped[place]]
    np.concatenate([array.transpose(1, 2, 0) for array in both], axis=-1, out=out)
    if not np.isfinite(out).all():
        raise BadExample(
            f"{shard.file}: latent {place} or its flipped copy holds NaN or infinity; extract "
            "this shard again"
        )


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; path must name the folder of the shards")
    # Names that begin with a dot are not data: some systems leave ._latents_... beside a copy.
    files = sorted(file for file in folder.glob("*.safetensors") if file.name[0] != ".")
    if not files:
        raise UserError(
            f"{folder}: holds no .safetensors files; path must name the folder of the shards"
        )
    return files


def _shard(file: Path) -> _Shard:
    held = safetensors_file.read(file)
    arrays = []
    for name, dtype in TENSORS.items():
        if name not in held:
            raise UserError(
                f"{file}: holds no {name!r}, but training needs {', '.join(TENSORS)}; extract the "
                "latents with their mirrored twins"
            )
        entry = held[name]
        if entry.dtype != dtype:
            raise UserError(
                f"{file}: {name} is of dtype {entry.dtype[:LONGEST_SHOWN]}, must be "
                f"{dtype}; extract it again"
            )
        arrays.append(np.ndarray(entry.shape, SHARD_DTYPES[dtype], entry.raw))
    return _Shard(file, *arrays)


def _check_shapes(shard: _Shard, first: _Shard) -> None:
    latents, flipped, labels = (array.shape for array in shard[1:])
    if len(latents) != 4 or flipped != latents or labels != latents[:1]:
        raise UserError(
            f"{shard.file}: latents {latents}, latents_flip {flipped} and labels {labels} must be "
            "[n, c, h, w], the same and [n]; extract this shard again"
        )
    if latents[1:] != first.latents.shape[1:]:
        raise UserError(
            f"{shard.file}: holds latents of {latents[1:]}, but {first.file.name} holds "
            f"{first.latents.shape[1:]}; keep one kind in a folder"
        )


def _check_labels(shard: _Shard, num_classes: int) -> None:
    outside = np.flatnonzero((shard.labels < 0) | (shard.labels >= num_classes))
    if outside.size:
        raise UserError(
            f"{shard.file}: label {shard.labels[outside[0]]} of latent {outside[0]} must lie in "
            f"0..{num_classes - 1}; raise num_classes or extract this shard again"
        )
