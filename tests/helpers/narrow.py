"""Random autoencoders with the published names and a quarter of the published widths, as files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from places import KEYS
from safetensors.numpy import save_file

NARROWER = {128: 32, 256: 64, 512: 96}  # whole groups of the group norm
LOG_VARIANCE = -26.0  # where `certain`


def state(kind: str, *, certain: bool = False) -> dict[str, np.ndarray]:
    """A state dict of sdvae_diffusers or vavae_f16d32; `certain` makes draws equal their mean."""
    rng = np.random.default_rng(0)
    entries = json.loads((KEYS / f"{kind}.json").read_text())
    arrays = {
        name: np.asarray(
            0.1 * rng.standard_normal([NARROWER.get(n, n) for n in entry["shape"]]), np.float32
        )
        for name, entry in entries.items()
    }
    if certain:
        half = len(arrays["quant_conv.bias"]) // 2
        arrays["quant_conv.weight"][half:] = 0
        arrays["quant_conv.bias"][half:] = LOG_VARIANCE
    return arrays


def save(file: Path, kind: str, *, certain: bool = False) -> str:
    save_file(state(kind, certain=certain), file)
    return str(file)


def encoder(codec: Any, side: int) -> Any:
    """What `codec` needs to encode images, on the device as a program gets it."""
    return jax.tree.map(jnp.asarray, codec.encoder_weights((side, side, 3)))
