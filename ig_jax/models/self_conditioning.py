"""Self-conditioning: later blocks are conditioned on what an earlier block computed (DDAE++).

With c the conditioning vector of the blocks (time + label embedding), h_s the tokens after block s,

  f  = mean over tokens of LayerNorm(h_s)     without parameters
  g  = W_g SiLU(time embedding) + b_g         W_g = 0 and b_g = 1 at the start
  c' = c + g (W_p f + b_p)                    W_p = 0 and b_p = 0 at the start

blocks 1 to s see c; blocks from s + 1 and the final layer see c'; an early head sees what its block
saw. At the start c' = c: the network is the one without self-conditioning. All of it happens in one
forward pass. It is not the self-conditioning of Analog Bits (arXiv 2208.04202), which hands a
sampler's last estimate to the next step.

Source: the idea of DDAE++, arXiv 2505.10999. Its authors published neither this equation nor code;
this is our reading of what is public (`docs/alignment.md`).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ig_jax.bounds import unset
from ig_jax.errors import require_all
from ig_jax.models import axes, layers
from ig_jax.models.axes import CONDITION, EMBED
from ig_jax.types import TokenGroups, Tokens

# Of g: a factor for each channel, one for all channels, or none.
SCALINGS = ("channels", "scalar", "none")

SEPARATED = (
    "model.self_conditioning pools the tokens of an image, and would tell groups that do not see "
    "each other of each other; turn one of the two off"
)


@dataclass(frozen=True)
class SelfConditioningSettings:
    """The section `model.self_conditioning`; a config without it has a network without it."""

    tap: int | None = unset(0)  # s, from 1; None: half of the depth
    normalise: bool  # f of normalised tokens
    scaling: str  # of `SCALINGS`
    stop_gradient: bool  # no gradient through f

    def __post_init__(self):
        rule = f"must be one of {', '.join(SCALINGS)}"
        require_all(self, [("scaling", self.scaling in SCALINGS, rule)])


class SelfConditioning(nnx.Module):
    """(tokens, time embedding, c) -> c'; float32 as the time embedding is."""

    def __init__(self, hidden_size: int, settings: SelfConditioningSettings, *, rngs: nnx.Rngs):
        self.settings = settings
        self.norm = layers.layer_norm(hidden_size, EMBED, affine=False, epsilon=1e-6, rngs=rngs)
        self.project = nnx.Linear(
            hidden_size,
            hidden_size,
            kernel_init=layers.zeros,
            rngs=rngs,
            **axes.linear_metadata((EMBED,), (CONDITION,)),
        )
        if settings.scaling != "none":
            scalar = settings.scaling == "scalar"
            self.scale = nnx.Linear(
                hidden_size,
                1 if scalar else hidden_size,
                kernel_init=layers.zeros,
                bias_init=nnx.initializers.ones_init(),
                rngs=rngs,
                **axes.linear_metadata((CONDITION,), ("scalar" if scalar else CONDITION,)),
            )

    def __call__(
        self,
        tokens: Tokens,
        times: Float[Array, "b *g d"],
        c: Float[Array, "b *g d"],
        groups: TokenGroups | None = None,
    ) -> Float[Array, "b *g d"]:
        """c' for the blocks behind the tap.

        Args:
          tokens: after the tap.
          times: embedded times, of each group of tokens where groups have times of their own.
          c: what the blocks up to the tap were conditioned on.
          groups: which tokens have which time; a group's f is the mean over its own tokens.

        Raises:
          ValueError: the groups do not see each other.
        """
        if groups is not None and groups.attention is not None:
            raise ValueError(f"groups.attention: {SEPARATED}")
        if self.settings.normalise:
            tokens = self.norm(tokens)
        # Without times of their own, groups of tokens are one image.
        f = jnp.mean(tokens, axis=1) if c.ndim == 2 else _each_mean(tokens, groups, c.shape[1])
        routed = self.project(lax.stop_gradient(f) if self.settings.stop_gradient else f)
        if self.settings.scaling == "none":
            return c + routed
        return c + self.scale(nnx.silu(times)) * routed


def _each_mean(tokens: Tokens, groups: TokenGroups, count: int) -> Float[Array, "b g d"]:
    """The mean over each group's tokens; 0 for a group without any."""

    def mean(group: int) -> Float[Array, "b d"]:
        mine = (groups.condition == group)[..., None]
        return jnp.sum(jnp.where(mine, tokens, 0), axis=1) / jnp.maximum(jnp.sum(mine, axis=1), 1)

    return jnp.stack([mean(group) for group in range(count)], axis=1)
