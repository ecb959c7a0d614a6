"""VA-VAE, factor 16 and 32 channels: the autoencoder of LightningDiT (arXiv 2501.01423).

The names are those of the original latent diffusion code; beyond the middle it has attention after
every block of its lowest level. Models see its latents whitened by statistics of each channel,
which come with the data. The network is in `kl_layers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ig_jax.codecs import kl_layers, kl_names

encode = kl_layers.encode
decode = kl_layers.decode

_BLOCK = r"encoder\.down\.(\d+)\.block\.(\d+)\."
LEVEL_ATTENTION = r"encoder\.down\.(\d+)\.attn\."

# Ours -> theirs, applied one after the other.
_RENAMED = [
    (r"\.(down|up)sample\.", r".\1sample.conv."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.(kernel|scale)$", ".weight"),
]

# What only training uses: the model to align with, the map to it, perceptual and adversarial loss.
_TRAINING_ONLY = ("foundation_model.", "linear_proj.", "loss.")


def _published(ours: str, levels: int) -> tuple[str]:
    # Theirs are numbered by resolution, ours in the order in which they run.
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", ours)
    return (kl_names.rename(name, _RENAMED),)


def from_published(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters for `encode` and `decode` from a state dict of any sizes.

    Names of what only training uses are passed over.

    Raises:
      ValueError: lists every name that is missing, left over, or of another shape.
    """
    network = {n: array for n, array in state.items() if not n.startswith(_TRAINING_ONLY)}
    sizes = kl_names.read_sizes(network, _BLOCK, LEVEL_ATTENTION)
    return kl_names.fill_parameters(network, sizes, partial(_published, levels=len(sizes.widths)))
