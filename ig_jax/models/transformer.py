"""The transformer that SiT, DiT and LightningDiT are: settings, parameters, one forward pass.

A readout is a second final layer of the same shape, applied to the tokens after one of the blocks:
an early head that predicts the same as the final one (Internal Guidance, arXiv 2512.24176). In the
published code it is called `final_layer_xr`, and the depth it reads `encoder_depth` (counted from
1). Here any number of depths may have one.

A family (`sit.py`, `dit.py`, `lightningdit.py`) is a settings class, which says what its blocks are
made of, and a network class, which may turn inputs and outputs into this code's conventions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ig_jax.bounds import at_most
from ig_jax.errors import shown
from ig_jax.models import embed, layers, trunk
from ig_jax.types import DTYPES, Gather, Key, Labels, Latents, NetOutput, Params, Tokens, Whole

# Beyond these, tracing a network or its position table takes minutes, and no machine trains it.
WIDEST, MOST_READOUTS, POSITIONS = 2**20, 64, 2**27


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

    @property
    @abstractmethod
    def options(self) -> layers.BlockOptions:
        """What the blocks are made of."""

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
        for field, holds, rule in rules:
            if not holds:
                raise ValueError(f"{field} = {shown(getattr(self, field))}: {rule}")
        self._check_heads()
        self._check_readouts()

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


def data_of(params: Params) -> tuple[int, int, int]:
    """(side, channels, classes) of the latents that a network with such parameters is for."""
    patch, _, channels, _ = params["x_embedder"]["proj"]["kernel"].shape
    tokens = params["pos_embed"].shape[1]
    rows = params["y_embedder"]["table"]["embedding"].shape[0]
    return patch * math.isqrt(tokens), channels, rows - 1


class _Shell(nnx.Module):
    """Everything of a network but its blocks."""

    def __init__(
        self,
        s: TransformerSettings,
        side: int,
        channels: int,
        classes: int,
        outputs: int,
        readout_init: nnx.Initializer,
        *,
        rngs: nnx.Rngs,
    ):
        dtype = DTYPES[s.dtype]
        features = s.patch_size**2 * outputs * channels

        def head(init: nnx.Initializer):
            return layers.FinalLayer(
                s.hidden_size, features, s.options, init, dtype=dtype, rngs=rngs
            )

        self.pos_embed = nnx.Param(
            jnp.asarray(embed.position_table(side // s.patch_size, s.hidden_size))
        )
        self.x_embedder = embed.PatchEmbed(
            channels, s.hidden_size, s.patch_size, dtype=dtype, rngs=rngs
        )
        self.t_embedder = embed.TimeEmbed(s.hidden_size, scale=s.time_scale, rngs=rngs)
        self.y_embedder = embed.LabelEmbed(classes, s.hidden_size, rngs=rngs)
        self.heads = nnx.Dict({f"depth_{depth}": head(readout_init) for depth in s.readouts})
        self.final_layer = head(layers.zeros)

    def tokens(self, x: Latents) -> Tokens:
        # The residual stream is float32 (as under the reference's autocast): the table promotes it.
        return self.x_embedder(x) + self.pos_embed[...]

    def condition(self, t: Array, y: Labels) -> Array:
        return self.t_embedder(t) + self.y_embedder(y)


def _params(module: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@dataclass(frozen=True)
class Transformer:
    """A network for latents [side, side, channels]: initial parameters and the forward pass."""

    settings: TransformerSettings
    side: int
    channels: int
    num_classes: int
    gather: Gather = Whole()  # inside a program whose devices share the parameters

    readout_init: ClassVar[nnx.Initializer]  # of both matrices of an early head
    outputs: ClassVar[int] = 1  # values of a head for each channel; the first is the prediction

    def __post_init__(self):
        if self.side % self.settings.patch_size:
            raise ValueError(
                f"patch_size = {self.settings.patch_size}: must divide the side of the latents, "
                f"{self.side}"
            )
        tokens = (self.side // self.settings.patch_size) ** 2
        if tokens * self.settings.hidden_size > POSITIONS:
            raise ValueError(
                f"patch_size = {self.settings.patch_size}: makes {tokens:,} tokens of latents of "
                f"side {self.side}, and their position table would have more than {POSITIONS:,} "
                "numbers; choose a larger patch or smaller latents"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.side, self.side, self.channels

    def _shell(self, rngs: nnx.Rngs) -> _Shell:
        data = (self.side, self.channels, self.num_classes)
        family = type(self)
        return _Shell(self.settings, *data, family.outputs, family.readout_init, rngs=rngs)

    def _block(self, rngs: nnx.Rngs) -> layers.Block:
        s = self.settings
        dtype = DTYPES[s.dtype]
        return layers.Block(
            s.hidden_size, s.num_heads, s.mlp_ratio, s.options, dtype=dtype, rngs=rngs
        )

    @cached_property
    def _graphs(self) -> tuple[nnx.GraphDef, nnx.GraphDef]:
        """What the modules are without their arrays; made once, abstractly."""
        shell = nnx.eval_shape(lambda: self._shell(nnx.Rngs(0)))
        block = nnx.eval_shape(lambda: self._block(nnx.Rngs(0)))
        return nnx.split(shell, nnx.Param, ...)[0], nnx.split(block, nnx.Param, ...)[0]

    def init(self, key: Key) -> Params:
        """Fresh float32 parameters, a nested dict; `blocks` holds one stack [depth, ...] a matrix.

        Xavier-uniform matrices and zero biases; label table and time MLP N(0, 0.02); the blocks'
        modulation and the final head zero, early heads as the family does. Call it under `jax.jit`.
        """
        shell_key, block_key = jax.random.split(key)
        block_keys = jax.random.split(block_key, self.settings.depth)
        blocks = jax.vmap(lambda k: _params(self._block(nnx.Rngs(k))))(block_keys)
        return {**_params(self._shell(nnx.Rngs(shell_key))), "blocks": blocks}

    def __call__(
        self, params: Params, x: Latents, t: Array, y: Labels, *, taps: tuple[int, ...] = ()
    ) -> NetOutput:
        """Prediction at (x, t) for labels y, with the early predictions and the tapped tokens.

        Args:
          params: as `init` makes them.
          x: latents [b, side, side, channels].
          t: times [b], what the process's `condition_time` says.
          y: labels [b]; `num_classes` is the null class.
          taps: depths (from 1) whose tokens are returned, float32.
        """
        s = self.settings
        shell_graph, block_graph = self._graphs
        params = self.gather.once(params)
        rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
        shell = nnx.merge(shell_graph, rest)
        c = shell.condition(t, y)
        tokens, exits = trunk.run_blocks(
            lambda p, tokens: nnx.merge(block_graph, self.gather.block(p))(tokens, c),
            params["blocks"],
            shell.tokens(x),
            exits=s.readouts + taps,
            remat=s.remat,
            unroll=s.unroll,
        )

        def read(head: layers.FinalLayer, tokens: Tokens) -> Latents:
            values = embed.unpatchify(head(tokens, c), s.patch_size)
            return values[..., : self.channels].astype(jnp.float32)

        return NetOutput(
            pred=read(shell.final_layer, tokens),
            heads={d: read(shell.heads[f"depth_{d}"], exits[d]) for d in s.readouts},
            features={d: exits[d] for d in taps},
        )
