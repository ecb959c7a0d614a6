"""SRA 2: a block's tokens, through a head of their own, predict the clean latent.

  L = mean over tokens and channels of smoothL1(MLP(h_d) - patches of x_0),
  smoothL1(e) = e^2 / (2 beta) where |e| < beta, else |e| - beta / 2;   beta = 0.05

The head is five layers, D -> 2D, three times 2D -> 2D, 2D -> p p c, with SiLU between. There is no
teacher and no second network: the target is what the network was given to denoise, before noise.

Source: arXiv 2601.17830 ("VAE-REPA"). No code is published. The paper leaves the head's width and
the target's scale open: 2D fits both numbers that it gives of an XL (18M parameters, 4 % of the
FLOPs), and the target is the latent as the network is trained on it. Latents far from unit scale
are reported to make training collapse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from ig_jax.models import embed
from ig_jax.models.network import Network
from ig_jax.objectives import heads
from ig_jax.objectives.base import Needs, NoisedBatch, Term
from ig_jax.objectives.distances import smooth_l1
from ig_jax.types import NONE, Key, Params, PerExample

BETA = 0.05
_LAYERS = 5


@dataclass(frozen=True)
class Sra2(Term):
    """Smooth-L1 distance of projected tokens to the patches of the clean latent."""

    depth: int  # of the tapped block, from 1; published: 2 for B, 8 for L and XL

    @property
    def needs(self) -> Needs:
        return Needs(taps=(self.depth,))

    def init(self, key: Key, net: Network) -> Params:
        """Xavier-uniform kernels and zero biases, as the network's blocks begin."""
        width = net.settings.hidden_size
        features = net.settings.patch_size**2 * net.channels
        return heads.init_mlp(key, (width, *[2 * width] * (_LAYERS - 1), features))

    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        tokens = batch.out.features[self.depth]
        patch = embed.patch_side(batch.x0.shape[1], tokens.shape[1])
        error = heads.apply_mlp(head, tokens, batch.dtype) - embed.patchify(batch.x0, patch)
        return jnp.mean(smooth_l1(error, BETA), axis=(1, 2))
