"""Samplers. A new one: a file with a frozen dataclass (see `base.Sampler`), and a row here."""

from ig_jax.samplers.ancestral import DDIM, Ancestral
from ig_jax.samplers.dopri5 import Dopri5
from ig_jax.samplers.euler import Euler
from ig_jax.samplers.euler_maruyama import EulerMaruyama
from ig_jax.samplers.heun import Heun, Heun2

SAMPLERS = {
    "euler": Euler,
    "heun": Heun,
    "heun2": Heun2,
    "euler_maruyama": EulerMaruyama,
    "dopri5": Dopri5,
    "ancestral": Ancestral,
    "ddim": DDIM,
}
