"""Sources of training examples. A new one: a file with a frozen dataclass (`types.Source`), and a row."""

from ig_jax.data.digits import Digits

SOURCES = {"digits": Digits}
