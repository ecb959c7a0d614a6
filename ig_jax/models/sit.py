"""SiT (arXiv 2401.08740): LayerNorm without parameters, GELU, fixed positions.

Both kinds of head start at zero, as in the published SiT + Internal Guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from ig_jax.models import layers
from ig_jax.models.transformer import Transformer, TransformerSettings

# Names of the papers: depth, hidden size, heads.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclass(frozen=True)
class SiTSettings(TransformerSettings):
    """Sizes and precision; the blocks of a SiT leave nothing else to choose."""

    @property
    def options(self) -> layers.BlockOptions:
        return layers.BlockOptions(
            rms_norm=False, swiglu=False, rotary=False, shift=True, qk_norm=self.qk_norm
        )


class SiT(Transformer):
    """A SiT for latents [side, side, channels]."""

    readout_init: ClassVar[nnx.Initializer] = layers.zeros
