"""A network as a pure function: a module split into its graph definition and plain arrays.

Programs keep parameters as nested dicts of arrays under the module's names: they differentiate,
average, split over devices and save those without the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
from flax import nnx
from jaxtyping import Array

from ig_jax.models.axes import Axes, of_module
from ig_jax.models.transformer import Transformer, TransformerSettings
from ig_jax.types import Gather, Key, Latents, NetOutput, Params, TokenGroups, Tokens, Whole


@dataclass(frozen=True)
class Network:
    """The functional form of a module of `family` for latents [side, side, channels]."""

    family: type[Transformer]
    settings: TransformerSettings
    side: int
    channels: int
    num_classes: int
    gather: Gather = Whole()  # inside a program whose devices share the parameters

    def __post_init__(self):
        self.settings.check_side(self.side)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.side, self.side, self.channels

    def module(self, rngs: nnx.Rngs | Key) -> Transformer:
        """The module with fresh parameters; under `nnx.eval_shape` an abstract one."""
        data = (self.side, self.channels, self.num_classes)
        return self.family(self.settings, *data, rngs=rngs)

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, Axes]:
        """The module's graph without its arrays; created once, abstractly."""
        module = nnx.eval_shape(lambda: self.module(jax.random.key(0)))
        return nnx.graphdef(module), of_module(module)

    @property
    def axes(self) -> Axes:
        """Dotted path of every parameter -> names of its axes."""
        return self._split[1]

    def init(self, key: Key) -> Params:
        """Fresh float32 parameters, a nested dict; `blocks` holds one stack [depth, ...] a matrix.

        Call it under `jax.jit`.
        """
        return nnx.to_pure_dict(nnx.state(self.module(key), nnx.Param))

    def __call__(
        self,
        params: Params,
        x: Latents,
        t: Array,
        y: Array,
        *,
        taps: tuple[int, ...] = (),
        groups: TokenGroups | None = None,
    ) -> NetOutput:
        """`Transformer.__call__` of the module that has these parameters, as `init` makes them."""
        module = nnx.merge(self._split[0], self.gather.once(params))
        return module(x, t, y, taps=taps, groups=groups, gather=self.gather)

    def tokens(
        self,
        params: Params,
        x: Latents,
        t: Array,
        y: Array,
        depths: tuple[int, ...],
        groups: TokenGroups | None = None,
    ) -> dict[int, Tokens]:
        """`Transformer.tokens` of the module that has these parameters."""
        module = nnx.merge(self._split[0], self.gather.once(params))
        return module.tokens(x, t, y, depths, groups=groups, gather=self.gather)
