"""Random access to a split of a data set in the layout of TensorFlow Datasets (`tfds_files.py`).

Examples come as tf.train.Example has them; what their features hold is for the sources to decode.
"""

from __future__ import annotations

import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ig_jax.data.read_pool import THREADS, Readers
from ig_jax.data.tfds import info as tfds_info
from ig_jax.data.tfds.format import INFO
from ig_jax.data.tfds.info import Feature
from ig_jax.errors import BadExample, UserError, shown

# Without reading ahead, as examples are read in random order.
READER_OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 2**15}

TfdsExample = Mapping[str, Any]  # feature name -> tf.train.Feature


class _Shard(NamedTuple):
    file: Path
    reader: Any  # of array_record; threads may share it
    skip: int  # records before the first that belongs to the split
    take: int  # records of the split


@dataclass(frozen=True)
class Split:
    """Random access to the examples of a split, from several threads at once."""

    features: Mapping[str, Feature]
    shards: list[_Shard]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.take for shard in self.shards])

    @cached_property
    def _readers(self) -> Readers:
        return Readers()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: np.ndarray) -> list[TfdsExample]:
        """The examples, in the order asked for.

        Raises:
          BadExample: one of them is corrupt; names its shard and record.
        """
        # Not by TFDS, which takes three times as long to parse an example.
        return list(self._readers.each(self._example, indices))

    def name(self, index: int) -> str:
        """'imagenet2012-train.array_record-00000-of-01024:17', the shard and its record."""
        shard, record = self._locate(index)
        return f"{shard.file.name}:{record}"

    def place(self, index: int) -> str:
        """Name of an example in messages."""
        shard, record = self._locate(index)
        return f"{shard.file}: record {record}"

    def label(self, example: TfdsExample, index: int, num_classes: int) -> int:
        """The class of example number `index`; 0 where the data set has no labels.

        Raises:
          BadExample: it has none.
          UserError: it lies outside of 0..num_classes - 1.
        """
        if "label" not in self.features:
            return 0
        values = example["label"].int64_list.value
        if len(values) != 1:
            raise BadExample(f"{self.place(index)} holds no label; write it again")
        if not 0 <= values[0] < num_classes:
            raise UserError(
                f"{self.place(index)}: label {values[0]} must lie in 0..{num_classes - 1}; raise "
                "num_classes, or name a split that has labels"
            )
        return values[0]

    def file_name(self, example: TfdsExample, index: int) -> str:
        """The feature `file_name`, as data sets that were made of files have it; else `name`."""
        values = example["file_name"].bytes_list.value if "file_name" in self.features else ()
        return values[0].decode(errors="replace") if values else self.name(index)

    def _locate(self, index: int) -> tuple[_Shard, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        return shard, int(index - self._ends[number]) + shard.take + shard.skip

    def _example(self, index: int) -> TfdsExample:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        shard, record = self._locate(index)
        try:
            (message,) = shard.reader.read([record])
            return tf_example_pb2.Example.FromString(message).features.feature
        except (RuntimeError, DecodeError) as error:
            raise BadExample(
                f"{self.place(index)} cannot be read ({_reason(error)}); copy the file again"
            ) from error


class OfSplit(ABC):
    """Base of sources that are a split of a data set: `path`, `split`, and access to both."""

    path: str
    split: str

    def __post_init__(self):
        if not self.path:
            raise ValueError(f"path = '': must name the folder that holds {INFO}")
        if not self.split:
            raise ValueError("split = '': must name a split of the data set, such as train")

    @abstractmethod
    def _check_features(self, features: Mapping[str, Feature]) -> None:
        """Raises UserError unless the examples hold what the source reads."""

    @cached_property
    def _opened(self) -> Split:
        opened = open_split(Path(self.path), self.split)
        self._check_features(opened.features)
        return opened

    def __len__(self) -> int:
        return len(self._opened)

    def name(self, index: int) -> str:
        """The file of the image where the data set has it, else the shard and record."""
        return self._opened.file_name(*self._opened.read(np.array([index])), index)

    def held_out(self) -> None:
        return None  # another split is a source of its own


def open_split(path: Path, split: str) -> Split:
    """A split of the data set in the folder that holds dataset_info.json.

    Args:
      split: a name, or a part of one in the words of TFDS, such as train[:10%].

    Raises:
      UserError: the folder is no data set, is not stored as ArrayRecord, has no such split, or a
        shard of it is missing or cut off.
    """
    description = tfds_info.read(path)
    try:
        instructions = description.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path}: has no split {shown(split)}; name one of {', '.join(description.splits)}"
        ) from error
    if not instructions:
        raise UserError(f"{path}: the split {shown(split)} holds no examples; name another one")
    _allow_open_files(len(instructions))
    with ThreadPoolExecutor(THREADS) as openers:  # there may be a thousand shards
        return Split(description.features, list(openers.map(_shard, instructions)))


def _allow_open_files(count: int) -> None:
    """So many more than now, where the system lets a program raise its own limit.

    ImageNet has 1024 shards in its public build, as many as systems usually allow files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _shard(instruction: Any) -> _Shard:
    from array_record.python.array_record_module import ArrayRecordReader

    file = Path(instruction.filename)
    if not os.path.isfile(file):  # which takes a name that is too long for an absent file
        raise UserError(f"{file}: is missing; copy it from where the data set comes from")
    reader = ArrayRecordReader(str(file), **READER_OPTIONS)
    if not reader.ok():
        reason = _why_not_open(reader)
        fix = "raise `ulimit -n`" if "Too many open files" in reason else "copy it again"
        raise UserError(f"{file}: is cut off or cannot be opened ({reason}); {fix}")
    if reader.num_records() != instruction.examples_in_shard:
        raise UserError(
            f"{file}: holds {reader.num_records()} examples, but {INFO} says "
            f"{instruction.examples_in_shard}; copy both again"
        )
    return _Shard(file, reader, instruction.skip, instruction.take)


def _why_not_open(reader: Any) -> str:
    try:
        reader.read([0])
    except RuntimeError as error:  # the only way to its reason
        return _reason(error)
    return "for an unknown reason"


def _reason(error: Exception) -> str:
    """The first line: what TFDS adds to errors is long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
