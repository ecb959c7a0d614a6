"""Sources of training examples. A new one: a file with a `types.Source`, and a row here."""

from ig_jax.data.sources.array_record import ArrayRecord
from ig_jax.data.sources.digits import Digits
from ig_jax.data.sources.emoji import Emoji
from ig_jax.data.sources.image_folder import ImageFolder
from ig_jax.data.sources.npy_folder import NpyFolder
from ig_jax.data.sources.own_images import OwnImages
from ig_jax.data.sources.safetensors_shards import SafetensorsShards
from ig_jax.data.sources.synthetic import Synthetic
from ig_jax.data.sources.tfds_images import TfdsImages
from ig_jax.data.sources.tree_density import Tree

SOURCES = {
    "array_record": ArrayRecord,
    "digits": Digits,
    "emoji": Emoji,
    "image_folder": ImageFolder,
    "npy_folder": NpyFolder,
    "own_images": OwnImages,
    "safetensors_shards": SafetensorsShards,
    "synthetic": Synthetic,
    "tfds_images": TfdsImages,
    "tree": Tree,
}
