"""DiT (arXiv 2212.09748): a SiT that predicts noise, and beside it the variance of a DDPM step.

The blocks are SiT's, which took them from DiT. Heads give two values a channel and a latent pixel:
first the noise of all channels, then for each where the log variance of an ancestral step lies
between its two bounds. The prediction is the first half, `NetOutput.variance` the second half of
the final head. Both halves are rows of one matrix product; what follows it for the variance is dead
code where nothing reads it. An early head has the shape of the final one, here as in every family,
and so carries such a half too, which nothing reads.

The network is told DDPM's step, 0 to 999, by the process (`diffusion/ddpm.py`).
"""

from __future__ import annotations

from typing import ClassVar

from ig_jax.models.sit import SiT


class DiT(SiT):
    """A DiT for latents [side, side, channels]; its settings are those of a SiT."""

    outputs: ClassVar[int] = 2
