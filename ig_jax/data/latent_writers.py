"""Latents to disk, in a layout that others read: what --mode=prepare writes.

  array_record        {latents}-train.array_record-00000-of-00129, readable by TFDS; any codec
  npy_folder          vae-sd/00000/img-mean-std-00000000.npy and dataset.json: REPA, SRA, IG; sd_vae
  safetensors_shards  latents_rank00_shard000.safetensors and latents_stats.pt: LightningDiT; va_vae

A data set is written in parts, each whole or not at all, so that a run that was killed goes on; its
bytes depend on the examples alone. What describes the whole is written at the end.
"""

from __future__ import annotations

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float32, Int

from ig_jax.data import dataset_json, provenance
from ig_jax.data.sources import npy_folder, safetensors_shards
from ig_jax.data.sources.array_record import ARRAYS
from ig_jax.data.tfds import format as tfds_format
from ig_jax.io import files, safetensors_file
from ig_jax.io.torch import writer as torch_writer

NAME = "latents"  # of the data set, as TFDS knows it
SPLIT = "train"
_STATISTICS = "latents_stats.pt"


class LatentPart(NamedTuple):
    """Consecutive examples of the source, without those that could not be read."""

    number: int
    indices: Int[np.ndarray, "n"]  # in the source
    names: list[str]
    labels: Int[np.ndarray, "n"]
    stored: Float32[np.ndarray, "n h w c"]


class FinishedDataset(NamedTuple):
    """Facts about the data set that are known when all parts are written."""

    indices: list[list[int]]  # of the examples in the source, by part
    labels: list[list[int]]
    mean: np.ndarray  # float64 [channels], of latents
    std: np.ndarray


@dataclass(frozen=True)
class Layout(ABC):
    """Writes the parts and the end of one data set in `folder`; on the disk when that returns."""

    folder: Path
    codec: str
    parts: int
    num_classes: int
    shape: tuple[int, ...]  # of one example as stored, [h, w, c]

    codecs: ClassVar[tuple[str, ...]]  # whose latents it can hold

    @property
    def record_folder(self) -> Path:
        """Folder of the record of what made the latents."""
        return self.folder

    @abstractmethod
    def write(self, part: LatentPart) -> None:
        """Writes the files of one part; may find some of them already there."""

    @abstractmethod
    def finish(self, whole: FinishedDataset) -> None:
        """Writes what belongs to no part."""

    def _arrays(self, stored: np.ndarray) -> dict[str, np.ndarray]:
        """[n, h, w, c] -> what the files call it, each [n, channels, h, w]."""
        names = ARRAYS[self.codec]
        pieces = np.split(stored.transpose(0, 3, 1, 2), len(names), axis=1)
        return {n: np.ascontiguousarray(p) for n, p in zip(names, pieces, strict=True)}


class ArrayRecordLayout(Layout):
    codecs: ClassVar[tuple[str, ...]] = ("sd_vae", "va_vae")

    @cached_property
    def _features(self) -> Any:
        h, w, channels = self.shape
        names = ARRAYS[self.codec]
        shapes = {name: (channels // len(names), h, w) for name in names}
        return tfds_format.features_of(shapes, self.num_classes)

    def _file(self, part: int) -> Path:
        return self.folder / tfds_format.shard_name(NAME, SPLIT, part, self.parts)

    def write(self, part: LatentPart) -> None:
        arrays = self._arrays(part.stored)
        examples = (
            {"label": int(label), "file_name": name, **{n: a[row] for n, a in arrays.items()}}
            for row, (label, name) in enumerate(zip(part.labels, part.names, strict=True))
        )
        tfds_format.write_shard(self._file(part.number), examples, self._features)

    def finish(self, whole: FinishedDataset) -> None:
        if self.codec == "va_vae":  # the other has one published number instead
            _write_statistics(self.folder, whole)
        tfds_format.write_metadata(
            self.folder,
            name=NAME,
            split=SPLIT,
            features=self._features,
            shard_lengths=[len(numbers) for numbers in whole.labels],
            num_bytes=sum(self._file(part).stat().st_size for part in range(self.parts)),
            description=(
                f"Latents of {self.codec}; {provenance.PROVENANCE_FILE} tells how they were made."
            ),
        )


class NpyFolderLayout(Layout):
    codecs: ClassVar[tuple[str, ...]] = ("sd_vae",)

    @property
    def record_folder(self) -> Path:
        return self.folder / npy_folder.ROOT

    @staticmethod
    def _name(index: int) -> str:
        return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"

    def write(self, part: LatentPart) -> None:
        (moments,) = self._arrays(part.stored).values()
        written: list[Path] = []
        for index, array in zip(part.indices.tolist(), moments, strict=True):
            file = self.record_folder / self._name(index)
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, array)
            written.append(file)
        for place in (*written, *{file.parent for file in written}):
            files.sync(place)

    def finish(self, whole: FinishedDataset) -> None:
        pairs = zip(itertools.chain(*whole.indices), itertools.chain(*whole.labels), strict=True)
        entries = [[self._name(index), label] for index, label in pairs]
        files.write_text(
            self.record_folder / dataset_json.DATASET_JSON, json.dumps({"labels": entries})
        )


class SafetensorsLayout(Layout):
    codecs: ClassVar[tuple[str, ...]] = ("va_vae",)

    def write(self, part: LatentPart) -> None:
        arrays = self._arrays(part.stored) | {"labels": part.labels.astype(np.int64)}
        # As text, and what the published tool says.
        about = {"total_size": str(len(part.labels)), "dtype": "torch.float32", "device": "cpu"}
        file = self.folder / f"latents_rank00_shard{part.number:03d}.safetensors"
        _save_safetensors(file, arrays, about)

    def finish(self, whole: FinishedDataset) -> None:
        _write_statistics(self.folder, whole)


def _save_safetensors(
    file: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]
) -> None:
    """The library would write `about` in another order every time, and so other bytes."""
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        kind = safetensors_shards.TENSORS[name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    with files.replaced(file) as temporary, temporary.open("wb") as out:
        out.write(len(text).to_bytes(safetensors_file.LENGTH, "little") + text)
        for array in arrays.values():
            out.write(array.data)


def _write_statistics(folder: Path, whole: FinishedDataset) -> None:
    """Mean and standard deviation of every channel, (1, c, 1, 1), as LightningDiT reads them."""
    arrays = {n: getattr(whole, n).reshape(1, -1, 1, 1) for n in ("mean", "std")}
    torch_writer.save(folder / _STATISTICS, arrays)


LAYOUTS: Mapping[str, type[Layout]] = {
    "array_record": ArrayRecordLayout,
    "npy_folder": NpyFolderLayout,
    "safetensors_shards": SafetensorsLayout,
}
