"""The autoencoder of Stable Diffusion, factor 8 and 4 channels: AutoencoderKL of diffusers.

SiT and DiT were trained on its latents times `SCALE`. Published as sd-vae-ft-ema and sd-vae-ft-mse,
which have the same encoder; the network is in `kl_layers`, the names of its files here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ig_jax.codecs import kl_layers, kl_names

# What models see is the posterior's draw times this; `decode` wants it divided out again.
SCALE = 0.18215

encode = kl_layers.encode
decode = kl_layers.decode

_BLOCK = r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\."

# Ours -> theirs, applied one after the other.
_RENAMED = [
    (r"\.(down|up)\.(\d+)\.", r".\1_blocks.\2."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.(down|up)sample\.", r".\1samplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.0)\.proj_out\.", r"\1.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.(kernel|scale)$", ".weight"),
]

# The attention names of early diffusers, which published files still carry.
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _published(ours: str) -> tuple[str, ...]:
    new = kl_names.rename(ours, _RENAMED)
    old = re.sub(r"(to_[qkv]|to_out\.0)", lambda match: OLD[match[0]], new)
    return (new, old)


def from_published(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters for `encode` and `decode` from a state dict of diffusers, of any sizes.

    Raises:
      ValueError: lists every name that is missing, left over, or of another shape.
    """
    sizes = kl_names.read_sizes(state, _BLOCK)
    return kl_names.fill_parameters(state, sizes, _published)
