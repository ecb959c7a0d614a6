"""Processes from data to noise. A new one: a file with a frozen dataclass, and a row here."""

from ig_jax.diffusion.ddpm import DDPM
from ig_jax.diffusion.flow import Flow

PROCESSES = {"flow": Flow, "ddpm": DDPM}
