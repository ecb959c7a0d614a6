"""Samplers. A new one: a file with a frozen dataclass (see `base.Sampler`), and a row here."""

from ig_jax.samplers.adams_bashforth import AdamsBashforth
from ig_jax.samplers.ancestral import DDIM, Ancestral
from ig_jax.samplers.dopri5 import Dopri5
from ig_jax.samplers.dpmpp_2m import DPMpp2M
from ig_jax.samplers.edm_stochastic import EDMStochastic
from ig_jax.samplers.euler import Euler
from ig_jax.samplers.euler_maruyama import EulerMaruyama
from ig_jax.samplers.heun import Heun, Heun2

SAMPLERS = {
    "euler": Euler,
    "heun": Heun,
    "heun2": Heun2,
    "euler_maruyama": EulerMaruyama,
    "edm_stochastic": EDMStochastic,
    "dopri5": Dopri5,
    "dpmpp_2m": DPMpp2M,
    "adams_bashforth": AdamsBashforth,
    "ancestral": Ancestral,
    "ddim": DDIM,
}
