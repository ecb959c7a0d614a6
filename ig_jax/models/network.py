"""A network as a pure function: a module split into its graph definition and plain arrays.

Programs keep parameters as nested dicts of arrays under the module's names: they differentiate,
average, split over devices and save those without the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array

from ig_jax.models.axes import Axes, of_module
from ig_jax.models.transformer import Transformer, TransformerSettings
from ig_jax.types import Gather, Key, Latents, NetOutput, Params, TokenGroups, Tokens, Whole


class _Abstract(NamedTuple):
    """A module without its arrays."""

    graph: nnx.GraphDef
    axes: Axes
    params: Params  # shapes and dtypes


@lru_cache(maxsize=128)
def _abstract(family: type[Transformer], settings: TransformerSettings, *data: int) -> _Abstract:
    """Once for all networks that are alike: tracing a module's creation takes a good part of what
    tracing a training step does."""
    module = nnx.eval_shape(lambda: family(settings, *data, rngs=jax.random.key(0)))
    return _Abstract(nnx.graphdef(module), of_module(module), _params(module))


def _params(module: Transformer) -> Params:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


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
        return self.family(self.settings, *self._data, rngs=rngs)

    @property
    def _data(self) -> tuple[int, int, int]:
        return self.side, self.channels, self.num_classes

    @property
    def _abstract(self) -> _Abstract:
        return _abstract(self.family, self.settings, *self._data)

    @property
    def axes(self) -> Axes:
        """Dotted path of every parameter -> names of its axes."""
        return self._abstract.axes

    @property
    def abstract_params(self) -> Params:
        """Shapes and dtypes of what `init` makes."""
        return jax.tree.map(lambda x: x, self._abstract.params)

    def init(self, key: Key) -> Params:
        """Fresh float32 parameters, a nested dict; `blocks` holds one stack [depth, ...] a matrix.

        Call it under `jax.jit`.
        """
        return _params(self.module(key))

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
        module = nnx.merge(self._abstract.graph, self.gather.once(params))
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
        module = nnx.merge(self._abstract.graph, self.gather.once(params))
        return module.tokens(x, t, y, depths, groups=groups, gather=self.gather)

    def early(
        self,
        params: Params,
        x: Latents,
        t: Array,
        y: Array,
        depth: int,
        *,
        groups: TokenGroups | None = None,
    ) -> Latents:
        """`Transformer.early` of the module that has these parameters."""
        module = nnx.merge(self._abstract.graph, self.gather.once(params))
        return module.early(x, t, y, depth, groups=groups, gather=self.gather)
