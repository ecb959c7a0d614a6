"""LightningDiT (arXiv 2501.01423): RMSNorm, SwiGLU and rotary positions, each by choice.

The fixed position table stays beside the rotation, as published. Three things differ from SiT:

  - Direction. The published network counts time from noise to data and predicts the velocity
    data - noise. Here time runs from data to noise everywhere, so `LightningDiT` hands its
    transformer 1 - t and turns the sign of what it predicts. Published weights then mean what they
    did, and nothing else of the code knows of a second direction.
  - Initialisation. The early head is *not* zero at the start: the published code zeroes the final
    layer by name and leaves the readout's two matrices at Xavier-uniform. In SiT both start at 0.
  - Blocks: what `LightningDiTSettings` adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flax import nnx
from jaxtyping import Array

from ig_jax.models import layers
from ig_jax.models.transformer import Transformer, TransformerSettings
from ig_jax.types import Latents, TokenGroups, Tokens

# Names of the published models: depth, hidden size, heads.
SIZES = {
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}


@dataclass(frozen=True)
class LightningDiTSettings(TransformerSettings):
    """The published XL uses all of swiglu, rope, rms_norm and shift, and no qk_norm."""

    swiglu: bool  # gated MLP of hidden size floor(2/3 mlp_ratio hidden_size)
    rope: bool  # rotate queries and keys by row and column
    rms_norm: bool  # RMSNorm with a learned scale instead of LayerNorm without parameters
    shift: bool  # off: modulation only scales and gates (`wo_shift` of the published code)

    @property
    def options(self) -> layers.BlockOptions:
        return layers.BlockOptions(
            rms_norm=self.rms_norm,
            swiglu=self.swiglu,
            rotary=self.rope,
            shift=self.shift,
            qk_norm=self.qk_norm,
        )


class LightningDiT(Transformer):
    """A LightningDiT for latents [side, side, channels]."""

    readout_init: ClassVar[nnx.Initializer] = layers.xavier

    # Time and velocity as in this package, not as in the published code.

    def _condition(self, t: Array, y: Array) -> tuple[Array, Array]:
        return super()._condition(1 - t, y)

    def _read(
        self, head: layers.FinalLayer, parts: tuple[Tokens, Array], groups: TokenGroups | None
    ) -> tuple[Latents, Latents | None]:
        pred, variance = super()._read(head, parts, groups)
        return -pred, variance
