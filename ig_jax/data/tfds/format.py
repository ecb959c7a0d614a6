"""The layout of TensorFlow Datasets, stored as ArrayRecord, and how it is written; no TensorFlow.

The layout. A folder, by habit `<name>/<version>`, with `dataset_info.json` (splits and the number
of examples in every shard), `features.json` (names, shapes and encodings of what an example holds)
and shards such as `imagenet2012-train.array_record-00000-of-01024`, whose records are
tf.train.Example messages. `data/tfds_split.py` reads it.

What is written here depends on nothing but its content: the same examples give the same bytes.
TensorFlow Datasets is imported where it is used, for it takes half a second that other sources need
not pay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.io import files

INFO = "dataset_info.json"
FEATURES_FILE = "features.json"
FORMAT = "array_record"
TEMPLATE = (
    "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # of the names of shards, as TFDS says it
)
_VERSION = "1.0.0"
# One record a group, so that an example is read without its neighbours; latents barely compress.
WRITER_OPTIONS = "group_size:1,uncompressed"


def features_of(shapes: Mapping[str, tuple[int, ...]], num_classes: int) -> Any:
    """Features of an example that holds float32 arrays of these shapes, `label` and `file_name`."""
    from tensorflow_datasets import features

    # Written 15 times as fast as a list of floats, and as large.
    arrays = {
        name: features.Tensor(shape=shape, dtype=np.float32, encoding=features.Encoding.BYTES)
        for name, shape in shapes.items()
    }
    label = features.ClassLabel(num_classes=num_classes)
    return features.FeaturesDict({**arrays, "label": label, "file_name": features.Text()})


def shard_name(dataset: str, split: str, index: int, count: int) -> str:
    return f"{dataset}-{split}.{FORMAT}-{index:05d}-of-{count:05d}"


def write_shard(file: Path, examples: Iterable[Mapping[str, Any]], features: Any) -> None:
    """Writes a shard; the file appears when it is complete, and not at all when an error ends it.

    Args:
      examples: each with a value for every feature.
      features: as from `features_of`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())
    with files.replaced(file) as partial:
        writer = ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        for example in examples:
            message = serializer.get_tf_example(features.encode_example(example))
            # Otherwise the order of features differs between processes.
            writer.write(message.SerializeToString(deterministic=True))
        writer.close()


def write_metadata(
    folder: Path,
    *,
    name: str,
    split: str,
    features: Any,
    shard_lengths: list[int],
    num_bytes: int,
    description: str,
) -> None:
    """Makes a data set of the shards in the folder, which TFDS opens: writes the two JSON files.

    Args:
      name: of the data set, as in the names of the shards.
      shard_lengths: the number of examples in every shard.
      num_bytes: of all shards.
    """
    info = {
        "description": description,
        "fileFormat": FORMAT,
        "name": name,
        "splits": [
            {
                "filepathTemplate": TEMPLATE,
                "name": split,
                "numBytes": str(num_bytes),
                "shardLengths": [str(length) for length in shard_lengths],
            }
        ],
        "version": _VERSION,
    }
    features.save_config(folder)
    # Nothing reads the first before the second is there.
    files.sync(folder / FEATURES_FILE)
    files.write_json(folder / INFO, info)
