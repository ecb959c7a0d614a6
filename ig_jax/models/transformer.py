"""The transformer that SiT, DiT and LightningDiT are: settings, parameters, one forward pass.

A readout is a second final layer of the same shape, applied to the tokens after one of the blocks:
an early head that predicts the same as the final one (Internal Guidance, arXiv 2512.24176). In the
published code it is called `final_layer_xr`, and the depth it reads `encoder_depth` (counted from
1). Here any number of depths may have one.

A family (`sit.py`, `dit.py`, `lightningdit.py`) is a settings class, which says what its blocks are
made of, and a module class, which may turn inputs and outputs into this code's conventions.
Programs use the module as a pure function of its parameters (`network.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ig_jax.bounds import at_most, optional_section
from ig_jax.errors import require_all, shown
from ig_jax.models import axes, embed, layers, trunk
from ig_jax.models.self_conditioning import SelfConditioning, SelfConditioningSettings
from ig_jax.types import DTYPES, Gather, Key, Latents, NetOutput, Params, TokenGroups, Tokens, Whole

# Beyond these, tracing a network or its position table takes minutes, and no machine trains it.
WIDEST, MOST_READOUTS, POSITIONS = 2**20, 64, 2**27
UNSHARDED = Whole()


@dataclass(frozen=True)
class TransformerSettings(ABC):
    """Everything that shapes a network but its data, which gives latent side, channels, classes."""

    depth: int = at_most(1024)
    hidden_size: int = at_most(2**16)
    num_heads: int
    patch_size: int  # side of a patch, in latent pixels
    mlp_ratio: float  # width of the MLP over hidden_size
    qk_norm: bool  # normalise every head's queries and keys
    readouts: tuple[
        int, ...
    ]  # depths with an early head, from 1; () trains without Internal Guidance
    time_scale: float  # multiplies t before its sine features; 1 in the published models
    dtype: str  # compute type of the matrix products; parameters are float32
    remat: str  # what the backward pass recomputes: none, dots, full
    unroll: int = at_most(64)  # blocks per iteration of the scan
    # Whether, and how, tokens on the way condition later blocks; None: they do not.
    self_conditioning: SelfConditioningSettings | None = optional_section()

    @property
    @abstractmethod
    def options(self) -> layers.BlockOptions:
        """Options of the blocks."""

    @property
    def tap(self) -> int | None:
        """Block (from 1) after which self-conditioning changes the condition; None: it is off."""
        return self.self_conditioning and (self.self_conditioning.tap or max(1, self.depth // 2))

    def __post_init__(self):
        rules = [
            ("depth", self.depth >= 1, "must be at least 1"),
            ("patch_size", self.patch_size >= 1, "must be at least 1"),
            ("num_heads", self.num_heads >= 1, "must be at least 1"),
            (
                "hidden_size",
                self.hidden_size > 0 and self.hidden_size % 4 == 0,
                "must be divisible by 4, and above 0 (sine-cosine positions of two axes)",
            ),
            ("mlp_ratio", self.mlp_ratio > 0, "must be above 0; the published models use 4"),
            (
                "mlp_ratio",
                1 <= layers.mlp_width(self.hidden_size, self.mlp_ratio, self.options) <= WIDEST,
                f"makes an MLP {layers.mlp_width(self.hidden_size, self.mlp_ratio, self.options)} "
                f"wide, must be 1 to {WIDEST}; the published models use 4",
            ),
            ("time_scale", self.time_scale > 0, "must be above 0; the published models use 1"),
            ("dtype", self.dtype in DTYPES, f"must be one of {', '.join(DTYPES)}"),
            ("remat", self.remat in trunk.REMAT, f"must be one of {', '.join(trunk.REMAT)}"),
            ("unroll", self.unroll >= 1, "must be at least 1 (1 compiles a single block)"),
        ]
        require_all(self, rules)
        self._check_heads()
        self._check_readouts()
        self._check_tap()

    def num_tokens(self, side: int) -> int:
        """Tokens of latents of this side."""
        return (side // self.patch_size) ** 2

    def check_side(self, side: int) -> None:
        """Raises ValueError where a network of these settings cannot be one for such latents."""
        if side % self.patch_size:
            raise ValueError(
                f"patch_size = {self.patch_size}: must divide the side of the latents, {side}"
            )
        tokens = self.num_tokens(side)
        if tokens * self.hidden_size > POSITIONS:
            raise ValueError(
                f"patch_size = {self.patch_size}: makes {tokens:,} tokens of latents of side "
                f"{side}, and their position table would have more than {POSITIONS:,} numbers; "
                "choose a larger patch or smaller latents"
            )

    def _check_heads(self) -> None:
        if self.hidden_size % self.num_heads:
            enough = -(-self.hidden_size // self.num_heads) * self.num_heads
            raise ValueError(
                f"hidden_size = {self.hidden_size}: must be divisible by num_heads = "
                f"{self.num_heads}; the next that is: {enough}"
            )
        head_dim = self.hidden_size // self.num_heads
        if self.options.rotary and head_dim % 4:
            raise ValueError(
                f"hidden_size = {self.hidden_size}: with rope, a head's {head_dim} channels "
                f"(hidden_size / num_heads = {self.num_heads}) must be divisible by 4: pairs for "
                "rows and for columns"
            )

    def _check_readouts(self) -> None:
        for depth in self.readouts:
            if not 1 <= depth < self.depth:
                raise ValueError(
                    f"readouts = {shown(self.readouts)}: {depth} must lie in 1..{self.depth - 1}, "
                    f"before the last of depth = {self.depth} blocks; the published XL models use "
                    "8 of 28"
                )
        if len(self.readouts) > MOST_READOUTS:
            rule = f"must not name more than {MOST_READOUTS} depths"
            raise ValueError(f"readouts = {shown(self.readouts)}: {rule}")
        if len(set(self.readouts)) < len(self.readouts):
            raise ValueError(f"readouts = {shown(self.readouts)}: name each depth once")

    def _check_tap(self) -> None:
        if self.tap is not None and not 1 <= self.tap < self.depth:
            raise ValueError(
                f"self_conditioning.tap = {self.tap}: must lie in 1..{self.depth - 1}, before the "
                f"last of depth = {self.depth} blocks, or be None for half of the depth"
            )


def data_of(params: Params) -> tuple[int, int, int]:
    """(side, channels, classes) of the latents that a network with such parameters is for."""
    patch, _, channels, _ = params["x_embedder"]["proj"]["kernel"].shape
    tokens = params["pos_embed"].shape[1]
    rows = params["y_embedder"]["table"]["embedding"].shape[0]
    return patch * math.isqrt(tokens), channels, rows - 1


class _Course(NamedTuple):
    """How tokens go through the blocks, and what conditions them on the way."""

    block: trunk.Block
    start: trunk.State
    between: trunk.Between | None
    parts: Callable[[trunk.State], tuple[Tokens, Array]]  # tokens and condition of a state


class Transformer(nnx.Module):
    """A network for latents [side, side, channels].

    Xavier-uniform matrices and zero biases; label table and time MLP N(0, 0.02); the blocks'
    modulation and the final head zero, early heads as the family does; self-conditioning so that it
    changes nothing. All float32.
    """

    readout_init: ClassVar[nnx.Initializer]  # of both matrices of an early head
    outputs: ClassVar[int] = 1  # values of a head for each channel: prediction, then variance

    def __init__(
        self,
        settings: TransformerSettings,
        side: int,
        channels: int,
        num_classes: int,
        *,
        rngs: nnx.Rngs | Key,
    ):
        """Creates the parameters.

        Args:
          settings: of the family.
          side: of the latents.
          channels: of the latents.
          num_classes: without the null class.
          rngs: one key of its stream `params` is drawn. A key instead is used as it is.
        """
        settings.check_side(side)
        key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
        outer_key, block_key = jax.random.split(key)
        rngs, dtype = nnx.Rngs(outer_key), DTYPES[settings.dtype]
        width, grid = settings.hidden_size, side // settings.patch_size

        def head(init: nnx.Initializer) -> layers.FinalLayer:
            features = settings.patch_size**2 * self.outputs * channels
            options = settings.options
            return layers.FinalLayer(width, features, options, init, dtype=dtype, rngs=rngs)

        def block(key: Key) -> layers.Block:
            s, rngs = settings, nnx.Rngs(key)
            return layers.Block(width, s.num_heads, s.mlp_ratio, s.options, dtype=dtype, rngs=rngs)

        self.settings, self.channels = settings, channels
        self.pos_embed = nnx.Param(
            jnp.asarray(embed.position_table(grid, width)),
            **axes.axis_metadata("batch", "position", "position_features"),
        )
        self.x_embedder = embed.PatchEmbed(
            channels, width, settings.patch_size, dtype=dtype, rngs=rngs
        )
        self.t_embedder = embed.TimeEmbed(width, scale=settings.time_scale, rngs=rngs)
        self.y_embedder = embed.LabelEmbed(num_classes, width, rngs=rngs)
        # One stack [depth, ...] a matrix.
        self.blocks = nnx.vmap(block, transform_metadata=axes.STACKED)(
            jax.random.split(block_key, settings.depth)
        )
        self.heads = nnx.Dict(
            {f"depth_{depth}": head(type(self).readout_init) for depth in settings.readouts}
        )
        self.final_layer = head(layers.zeros)
        # Last, so that all other parameters of a key are the same with and without it.
        on = settings.self_conditioning
        self.self_conditioning = SelfConditioning(width, on, rngs=rngs) if on else None

    def __call__(
        self,
        x: Latents,
        t: Array,
        y: Array,
        *,
        taps: tuple[int, ...] = (),
        groups: TokenGroups | None = None,
        gather: Gather = UNSHARDED,
    ) -> NetOutput:
        """Prediction at (x, t) for labels y, with the early predictions and the tapped tokens.

        Args:
          x: latents [b, side, side, channels].
          t: times [b], what the process's `condition_time` says; or [b, g] for g groups of tokens.
          y: labels [b], or [b, g]; `num_classes` is the null class.
          taps: depths (from 1) whose tokens are returned, float32.
          groups: which tokens have which of the g times, and which see each other.
          gather: puts one block's parameters together where devices share them.
        """
        s, course = self.settings, self._course(x, t, y, groups, gather)
        last, exits = trunk.run_blocks(
            course.block,
            nnx.to_pure_dict(nnx.state(self.blocks)),
            course.start,
            exits=s.readouts + taps,
            remat=s.remat,
            unroll=s.unroll,
            between=course.between,
        )

        pred, variance = self._read(self.final_layer, course.parts(last), groups)
        return NetOutput(
            pred=pred,
            heads={d: self._read_early(d, course.parts(exits[d]), groups) for d in s.readouts},
            features={d: course.parts(exits[d])[0] for d in taps},
            variance=variance,
        )

    def tokens(
        self,
        x: Latents,
        t: Array,
        y: Array,
        depths: tuple[int, ...],
        *,
        groups: TokenGroups | None = None,
        gather: Gather = UNSHARDED,
    ) -> dict[int, Tokens]:
        """The tokens after the blocks `depths` (from 1), float32; no later block is computed.

        For passes without a gradient; for other arguments see `__call__`.
        """
        exits = self._first_blocks(x, t, y, depths, groups, gather)
        return {depth: tokens for depth, (tokens, _) in exits.items()}

    def early(
        self,
        x: Latents,
        t: Array,
        y: Array,
        depth: int,
        *,
        groups: TokenGroups | None = None,
        gather: Gather = UNSHARDED,
    ) -> Latents:
        """The prediction of the readout after block `depth`; no later block is computed.

        For passes without a gradient; for other arguments see `__call__`.
        """
        exits = self._first_blocks(x, t, y, (depth,), groups, gather)
        return self._read_early(depth, exits[depth], groups)

    def _first_blocks(
        self,
        x: Latents,
        t: Array,
        y: Array,
        depths: tuple[int, ...],
        groups: TokenGroups | None,
        gather: Gather,
    ) -> dict[int, tuple[Tokens, Array]]:
        """Tokens after the blocks `depths`, and what conditions them there."""
        course = self._course(x, t, y, groups, gather)
        exits = trunk.first_blocks(
            course.block,
            nnx.to_pure_dict(nnx.state(self.blocks)),
            course.start,
            exits=depths,
            unroll=self.settings.unroll,
            between=course.between,
        )
        return {depth: course.parts(state) for depth, state in exits.items()}

    def _read_early(
        self, depth: int, parts: tuple[Tokens, Array], groups: TokenGroups | None
    ) -> Latents:
        return self._read(self.heads[f"depth_{depth}"], parts, groups)[0]

    def _read(
        self, head: layers.FinalLayer, parts: tuple[Tokens, Array], groups: TokenGroups | None
    ) -> tuple[Latents, Latents | None]:
        """What a head predicts from tokens and condition, and the values for a variance."""
        values = embed.unpatchify(head(*parts, groups), self.settings.patch_size)
        pred, rest = values[..., : self.channels], values[..., self.channels :]
        return pred.astype(jnp.float32), rest.astype(jnp.float32) if self.outputs > 1 else None

    def _embedded(self, x: Latents) -> Tokens:
        """The tokens before the first block."""
        # The residual stream is float32 (as under the reference's autocast): the table promotes it.
        return self.x_embedder(x) + self.pos_embed[...]

    def _condition(self, t: Array, y: Array) -> tuple[Array, Array]:
        """Embedded times, and conditioning vectors [b, d]; [b, g, d] for times or labels [b, g]."""
        times, labels = self.t_embedder(t), self.y_embedder(y)
        if times.ndim > labels.ndim:
            labels = labels[:, None]
        return times, times + labels

    def _course(
        self, x: Latents, t: Array, y: Array, groups: TokenGroups | None, gather: Gather
    ) -> _Course:
        """The course of these latents; a condition that never changes is no part of the state."""
        (times, c), graph = self._condition(t, y), nnx.graphdef(self.blocks)

        def block(params: Params, tokens: Tokens, c: Array) -> Tokens:
            return nnx.merge(graph, gather.block(params))(tokens, c, groups)

        def changed(state: tuple[Tokens, Array]) -> tuple[Tokens, Array]:
            tokens, c = state
            return tokens, self.self_conditioning(tokens, times, c, groups)

        tokens = self._embedded(x)
        if self.self_conditioning is None:
            return _Course(
                lambda params, tokens: block(params, tokens, c), tokens, None, lambda x: (x, c)
            )
        return _Course(
            lambda params, state: (block(params, *state), state[1]),
            (tokens, c),
            trunk.Between(self.settings.tap, changed),
            lambda state: state,
        )
