"""Sources of training examples. A new one: a file with a `types.Source`, and a row here."""

from ig_jax.data.digits import Digits
from ig_jax.data.npy_folder import NpyFolder
from ig_jax.data.safetensors_shards import SafetensorsShards
from ig_jax.data.synthetic import Synthetic
from ig_jax.data.tree import Tree

SOURCES = {
    "digits": Digits,
    "npy_folder": NpyFolder,
    "safetensors_shards": SafetensorsShards,
    "synthetic": Synthetic,
    "tree": Tree,
}
