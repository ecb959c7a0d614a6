"""Sources of training examples. A new one: a file with a `types.Source`, and a row here."""

from ig_jax.data.digits import Digits
from ig_jax.data.synthetic import Synthetic
from ig_jax.data.tree import Tree

SOURCES = {"digits": Digits, "synthetic": Synthetic, "tree": Tree}
