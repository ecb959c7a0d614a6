"""Sources of training examples. A new one: a file with a `types.Source`, and a row here."""

from ig_jax.data.digits import Digits

SOURCES = {"digits": Digits}
