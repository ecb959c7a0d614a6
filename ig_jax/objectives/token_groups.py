"""Random groups of each image's tokens: dual-time scheduling and attention separation.

The tokens of each sample are parted at random into groups of fixed shares. With `dual_time` every
group has a time of its own, so that a network sees parts of one image at different noise; with
`separate_attention` tokens attend to their own group alone.

Source: "From SRA to Self-Flow", arXiv 2607.02508, and its published code; Self-Flow, arXiv
2603.06507, is the case of two times and full attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ig_jax.errors import require_all
from ig_jax.models import embed
from ig_jax.samplers.base import Sampler
from ig_jax.types import GroupTimes, Key, Latents, TokenGroups

MOST_GROUPS = 8


@dataclass(frozen=True)
class GroupSettings:
    """How tokens are parted; `shares` of () or one number are no groups."""

    shares: tuple[float, ...] = ()  # of the tokens, relative; published: (0.25, 0.75)
    dual_time: bool = False  # each group has a time of its own
    separate_attention: bool = False  # tokens attend to their own group only
    # Share of samples all of whose tokens are in the second of two groups.
    full_sample_prob: float = 0.0

    def __post_init__(self):
        shares = self.shares
        rules = [
            ("shares", all(0 < s < math.inf for s in shares), "each must be above 0"),
            ("shares", len(shares) <= MOST_GROUPS, f"must not be more than {MOST_GROUPS}"),
            ("full_sample_prob", 0 <= self.full_sample_prob <= 1, "must lie in [0, 1]"),
            (
                "full_sample_prob",
                not self.full_sample_prob or self.count == 2,
                f"needs two groups, not {self.count}",
            ),
            ("dual_time", not self.dual_time or self.count > 1, "needs at least two shares"),
            (
                "separate_attention",
                not self.separate_attention or self.count > 1,
                "needs at least two shares",
            ),
        ]
        require_all(self, rules)

    @property
    def count(self) -> int:
        """Number of groups."""
        return max(1, len(self.shares))

    @property
    def times(self) -> int:
        """Times that a sample has."""
        return self.count if self.dual_time else 1

    def sizes(self, tokens: int) -> np.ndarray:
        """Tokens of each group: shares rounded down, what is left to the largest remainders."""
        relative = np.float32(self.shares) / np.float32(sum(self.shares))
        exact = relative * np.float32(tokens)
        whole = np.floor(exact).astype(int)
        largest = np.argsort(-(exact - whole), kind="stable")
        whole[largest[: tokens - whole.sum()]] += 1
        return whole

    def draw(self, key: Key, samples: int, tokens: int) -> tuple[Array, ...]:
        """Uniform draws that rank the tokens [b, n], and one a sample [b]; () for one group."""
        if self.count == 1:
            return ()
        ranks, whole = jax.random.split(key)
        return jax.random.uniform(ranks, (samples, tokens)), jax.random.uniform(whole, (samples,))

    def ids(self, draws: tuple[Array, ...]) -> Int[Array, "b n"] | None:
        """The group of each token; None for one group.

        The tokens of the lowest draws are group 0, the next ones group 1, and so on.
        """
        if self.count == 1:
            return None
        ranked, whole = draws
        rank = jnp.argsort(jnp.argsort(ranked, axis=1), axis=1)
        ends = jnp.asarray(np.cumsum(self.sizes(ranked.shape[1])))
        ids = jnp.searchsorted(ends, rank.ravel(), side="right").reshape(rank.shape)
        ids = ids.astype(jnp.int32)
        return jnp.where((whole < self.full_sample_prob)[:, None], 1, ids)

    def of_network(self, ids: Int[Array, "b n"]) -> TokenGroups:
        """What the network sees of them; times [b] are those of all groups."""
        return TokenGroups(condition=ids, attention=ids if self.separate_attention else None)


@dataclass(frozen=True)
class SamplingGroups:
    """Two groups of tokens that do not see each other while sampling, at the same time t.

    For networks trained with separated attention; they sample with full attention, too, which is
    how they are evaluated. The published code cannot do this together with CFG; here both branches
    of a sample have its groups.
    """

    share: float = 0.0  # of the tokens in the first group, rounded down; 0: all see each other
    each_step: bool = False  # drawn for every step of the sampler, not once for a sample

    def __post_init__(self):
        rules = [
            ("share", 0 <= self.share < 1, "must lie in [0, 1); 0 is full attention"),
            ("each_step", not self.each_step or self.share > 0, "needs a share above 0"),
        ]
        require_all(self, rules)

    def check(self, sampler: Sampler, tokens: int) -> None:
        """Raises ValueError where this sampler, or an image of so many tokens, cannot have them."""
        if self.each_step and not sampler.stochastic:
            raise ValueError(
                f"token_groups.each_step = True: {type(sampler).__name__} adds no noise at its "
                "steps, and draws no groups for them; set it to False, or use a sampler that "
                "does, such as euler_maruyama"
            )
        if self.share and not self._first(tokens):
            raise ValueError(
                f"token_groups.share = {self.share}: is less than one of the {tokens} tokens of "
                f"an image; set it to 0 (full attention), or to at least "
                f"{math.ceil(1e4 / tokens) / 1e4}"
            )

    def _first(self, tokens: int) -> int:
        """Tokens in the first group."""
        return math.floor(self.share * tokens)

    def of_network(self, ranked: Float[Array, "b n"]) -> TokenGroups:
        """The groups that independent draws rank: the tokens of the lowest are the first."""
        rank = jnp.argsort(jnp.argsort(ranked, axis=1), axis=1)
        second = rank >= self._first(ranked.shape[1])
        return TokenGroups(attention=second.astype(jnp.int32))


def by_group(
    of_time: Callable[[Float[Array, "b"]], Latents], t: GroupTimes, ids: Int[Array, "b n"] | None
) -> Latents:
    """Latents of which each token's pixels are those of `of_time` at its group's time.

    Args:
      of_time: times [b] -> latents [b, h, w, c].
      t: times [b, g]; or [b], the same for all tokens.
      ids: group of each token, row-major over a square grid of patches.
    """
    if t.ndim == 1:
        return of_time(t)
    mixed = of_time(t[:, 0])
    mine = of_pixels(ids, mixed.shape[1])
    for group in range(1, t.shape[1]):
        mixed = jnp.where(mine == group, of_time(t[:, group]), mixed)
    return mixed


def of_pixels(ids: Int[Array, "b n"], side: int) -> Int[Array, "b h w 1"]:
    """The group of each pixel of latents [b, side, side, c]."""
    patch = embed.patch_side(side, ids.shape[1])
    grid = ids.reshape(-1, side // patch, side // patch)
    return jnp.repeat(jnp.repeat(grid, patch, axis=1), patch, axis=2)[..., None]


def of_each_token(t: Float[Array, "b g"], ids: Int[Array, "b n"]) -> Float[Array, "b n"]:
    """The time of each token, that of its group."""
    return jnp.take_along_axis(t, ids, axis=1)
