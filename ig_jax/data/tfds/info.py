"""The JSON files of a TensorFlow Datasets folder: its splits, and the features of an example.

TFDS itself imports whatever module these files name (`pythonClassName`), here and in features
within features, and reads what their fields point to. So they are read here, into the few words
that the sources need, and never reach it; names of other classes than its own few are refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ig_jax.data.tfds.format import FEATURES_FILE, FORMAT, INFO, TEMPLATE
from ig_jax.errors import UserError, shown
from ig_jax.io import files
from ig_jax.io.paths import LONGEST_NAME

_PACKAGE = "tensorflow_datasets.core.features."
# Those that data sets of images and latents are made of; below PACKAGE.
FEATURE_CLASSES = frozenset(
    (
        *("features_dict.FeaturesDict", "sequence_feature.Sequence", "image_feature.Image"),
        *("class_label_feature.ClassLabel", "text_feature.Text", "scalar.Scalar"),
        *("tensor_feature.Tensor", "feature.Tensor", "bounding_boxes.BBoxFeature"),
    )
)
# Where a class is named: since TFDS 4.5 in either spelling, and before.
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
PLACEHOLDERS = re.compile(r"\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\}")
MOST_VALUES = 2**26  # of one tensor; a latent has some thousands


@dataclass(frozen=True)
class Feature:
    """One feature of an example, as far as it is read here."""

    kind: str  # Tensor, Image, ClassLabel, Text, ...
    shape: tuple[int | None, ...]  # None: any size
    dtype: str  # float32, uint8, ...; '': not said
    encoding: str  # of a tensor: none, bytes, zlib

    def __str__(self) -> str:
        return f"{self.kind}(shape={self.shape}, dtype={self.dtype})" if self.dtype else self.kind


@dataclass(frozen=True)
class Description:
    """A data set on the disk."""

    features: Mapping[str, Feature]
    splits: Any  # of TFDS: split or part of one -> shards to read


def read(path: Path) -> Description:
    """The description of the data set in a folder.

    Raises:
      UserError: a file is missing, damaged, describes no data set, names a class that is not read,
        or data that cannot be read at random.
    """
    if not os.path.isdir(path):
        raise UserError(f"{path}: is no folder; path must name the folder that holds {INFO}")
    for name in (INFO, FEATURES_FILE):
        if not os.path.exists(path / name):
            raise UserError(
                f"{path}: holds no {name}; path must name the folder of one version of a data set, "
                "such as imagenet2012/5.1.0"
            )
    info, features = (_Json(path / name) for name in (INFO, FEATURES_FILE))
    _check_format(path, info)
    return Description(_features(features), _splits(path, info))


class _Json:
    """A file of one JSON object, no part of which names a foreign class."""

    def __init__(self, file: Path):
        self.file, self.value = file, files.read_json(file)
        self.require(isinstance(self.value, dict), "is no JSON object")
        keys = CLASS_KEYS if file.name == FEATURES_FILE else CLASS_KEYS[:2]
        for name in _strings(self.value, keys):
            self.require(
                name.startswith(_PACKAGE) and name.removeprefix(_PACKAGE) in FEATURE_CLASSES,
                f"names the class {shown(name)}, which is not read (it could run any code)",
                f"known below {_PACKAGE.rstrip('.')}: {', '.join(sorted(FEATURE_CLASSES))}",
            )

    def require(self, holds: bool, fault: str, fix: str = "copy it again") -> None:
        if not holds:
            raise UserError(f"{self.file}: {fault}; {fix}")

    def get(self, value: Any, key: str, default: Any) -> Any:
        """A field of `value` in either spelling, fileFormat or file_format, of `default`'s type."""
        self.require(isinstance(value, dict), f"gives no {key}")
        snake = re.sub("([A-Z])", lambda found: "_" + found[1].lower(), key)
        found = value.get(key, value.get(snake, default))
        right = isinstance(found, type(default))
        self.require(right, f"holds {key} = {shown(found)}, must be a {type(default).__name__}")
        return found

    def integer(self, value: Any, what: str) -> int:
        """JSON of protocol buffers writes large numbers as text."""
        text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        right = re.fullmatch("-?[0-9]{1,18}", text) is not None
        self.require(right, f"holds {shown(value)} as {what}, must be a whole number")
        return int(text)


def _strings(value: Any, keys: tuple[str, ...]) -> Iterator[str]:
    """Strings under these keys, at any depth."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case dict() as found:
                yield from (found[k] for k in keys if isinstance(found.get(k), str))
                waiting.extend(found.values())
            case list() as found:
                waiting.extend(found)


def _check_format(path: Path, info: _Json) -> None:
    info.require(bool(info.get(info.value, "name", "")), "describes no data set")
    found = info.get(info.value, "fileFormat", "") or "tfrecord"
    if found != FORMAT:
        raise UserError(
            f"{path}: is stored as {shown(found)}, which cannot be read at random; build the data "
            f"set again with file_format='{FORMAT}'"
        )


def _features(file: _Json) -> dict[str, Feature]:
    """By name, of the FeaturesDict that an example is."""
    kind, content = _content(file, file.value)
    file.require(kind == "FeaturesDict", "describes no data set")
    # Before TFDS 4.5 the features were the content itself.
    inner = content if "type" in file.value else file.get(content, "features", {})
    return {name: _feature(file, name, value) for name, value in inner.items()}


def _content(file: _Json, value: Any) -> tuple[str, dict]:
    """The kind of a feature and what is said of it."""
    file.require(isinstance(value, dict), "describes no data set")
    named = [value[key] for key in CLASS_KEYS if isinstance(value.get(key), str)]
    file.require(len(named) == 1, "describes no data set: each feature must name its class once")
    kind = named[0].rsplit(".", 1)[-1]
    if "type" in value:
        return kind, file.get(value, "content", {})
    # Scalar is described by the words of Tensor.
    key = "tensor" if kind == "Scalar" else kind[0].lower() + kind[1:]
    return kind, file.get(value, key, {})


def _feature(file: _Json, name: str, value: Any) -> Feature:
    kind, content = _content(file, value)
    shape = content.get("shape", [])
    dimensions = file.get(shape, "dimensions", []) if isinstance(shape, dict) else shape
    file.require(isinstance(dimensions, list), f"holds {shown(shape)} as the shape of {name}")
    sizes = tuple(
        None if size in (None, -1, "-1") else file.integer(size, f"a size of {name}")
        for size in dimensions
    )
    known = [size for size in sizes if size is not None]
    file.require(
        all(size > 0 for size in known) and math.prod(known) <= MOST_VALUES,
        f"holds {shown(sizes)} as the shape of {name}, must be sizes above 0 with {MOST_VALUES:,} "
        "values at most",
    )
    dtype, encoding = file.get(content, "dtype", ""), file.get(content, "encoding", "none")
    return Feature(kind, sizes, dtype, encoding.lower() or "none")


def _splits(path: Path, info: _Json) -> Any:
    from tensorflow_datasets import core

    found = []
    for split in info.get(info.value, "splits", []):
        name = info.get(split, "name", "")
        info.require(bool(name), "has a split without a name")
        lengths = info.get(split, "shardLengths", [])
        lengths = [info.integer(length, f"a length of {name}") for length in lengths]
        info.require(min(lengths, default=0) >= 0, f"has a shard of {name} of negative length")
        template = info.get(split, "filepathTemplate", "") or TEMPLATE
        # TFDS formats it: any other braces could ask for a name of any length.
        rest = PLACEHOLDERS.sub("", template)
        info.require(
            not re.search(r"[{}]|\.\.|^/", rest) and len(template) <= LONGEST_NAME,
            f"has the template {shown(template)} of shards, must be a file below this folder with "
            "TFDS's placeholders",
        )
        shards = core.ShardedFileTemplate(
            data_dir=path,
            template=template,
            dataset_name=info.get(info.value, "name", ""),
            split=name,
            filetype_suffix=FORMAT,
        )
        found.append(core.SplitInfo(name, lengths, 0, shards))
    return core.SplitDict(found)
