"""Made-up latents in the layout of TensorFlow Datasets."""

import numpy as np

from ig_jax.data.sources.array_record import ArrayRecord
from ig_jax.data.tfds import format as tfds_format

IMAGES = 10
CLASSES = 7
LENGTHS = [4, 6]  # of the two shards
LABELS = [(5 * i + 3) % CLASSES for i in range(IMAGES)]
FILES = [f"n{i:08d}.JPEG" for i in range(IMAGES)]
MOMENTS = {"moments": (8, 2, 3)}
TWINS = {"latents": (5, 2, 3), "latents_flip": (5, 2, 3)}
SHARDS = [tfds_format.shard_name("toy", "train", index, 2) for index in range(2)]


def arrays(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(IMAGES, *s)).astype(np.float32) for name, s in shapes.items()}


def examples(shapes):
    stacked = arrays(shapes)
    return [
        {**{n: a[i] for n, a in stacked.items()}, "label": LABELS[i], "file_name": FILES[i]}
        for i in range(IMAGES)
    ]


def write(folder, rows, features):
    """The rows in two shards, and what describes them."""
    folder.mkdir(exist_ok=True)
    parts = [rows[: LENGTHS[0]], rows[LENGTHS[0] :]]
    for name, part in zip(SHARDS, parts, strict=True):
        tfds_format.write_shard(folder / name, part, features)
    tfds_format.write_metadata(
        folder,
        name="toy",
        split="train",
        features=features,
        shard_lengths=[len(part) for part in parts],
        num_bytes=sum((folder / name).stat().st_size for name in SHARDS),
        description="noise",
    )
    return folder


def write_latents(folder, shapes=MOMENTS):
    return write(folder, examples(shapes), tfds_format.features_of(shapes, CLASSES))


def source_of(folder, split="train", num_classes=CLASSES):
    return ArrayRecord(str(folder), split, num_classes)
