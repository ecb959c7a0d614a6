"""Samplers. A new one: a file with a frozen dataclass (see `base.Sampler`), and a row here."""

from ig_jax.samplers.euler import Euler
from ig_jax.samplers.euler_maruyama import EulerMaruyama
from ig_jax.samplers.heun import Heun

SAMPLERS = {"euler": Euler, "heun": Heun, "euler_maruyama": EulerMaruyama}
