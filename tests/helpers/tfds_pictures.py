"""Made-up images, and ImageNet's layout of TensorFlow Datasets around them."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ig_jax.data.crop import center_crop
from ig_jax.data.sources.tfds_images import TfdsImages
from ig_jax.data.tfds import format as tfds_format


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


CLASSES = 5
FOLDERS = ["n02", "n10", "n3"]  # sorted as text
FILES = ["n02/b.png", "n02/deep/a.PNG", "n10/z.jpeg", "n3/k.webp", "n3/l.png"]
LABELS = [0, 0, 1, 2, 2]
KINDS = {".PNG": "PNG", ".png": "PNG", ".jpeg": "JPEG", ".webp": "WEBP"}
SIZE = 8


def encoded(index, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(noise(20 + index, 18, seed=index)).save(buffer, kind)
    return buffer.getvalue()


def contents():
    return {
        name: encoded(index, KINDS["." + name.split(".")[1]]) for index, name in enumerate(FILES)
    }


def expected_pictures(names=FILES):
    found = [Image.open(io.BytesIO(contents()[name])) for name in names]
    return np.stack([center_crop(image, SIZE) for image in found])


LABEL = tfds.features.ClassLabel(num_classes=10)
IMAGENET = {"image": tfds.features.Image(), "label": LABEL, "file_name": tfds.features.Text()}
SHARD = tfds_format.shard_name("imagenet", "validation", 0, 1)


def write_tfds(folder, images=None, labels=LABELS, features=IMAGENET):
    """The images of the folder as TFDS stores them."""
    images = contents().values() if images is None else images
    rows = [
        {"image": io.BytesIO(image), "label": label, "file_name": name}
        for image, label, name in zip(images, labels, FILES, strict=True)
    ]
    connector = tfds.features.FeaturesDict(features)
    rows = [{name: row[name] for name in features} for row in rows]
    tfds_format.write_shard(folder / SHARD, rows, connector)
    texts = dict(name="imagenet", split="validation", description="")
    numbers = dict(shard_lengths=[5], num_bytes=0)
    tfds_format.write_metadata(folder, features=connector, **texts, **numbers)
    return folder


def tfds_source(folder, split="validation", num_classes=CLASSES):
    return TfdsImages(str(folder), split, SIZE, num_classes)
