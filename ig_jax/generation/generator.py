"""The compiled programs that turn noise into pictures, and what one picture costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from ig_jax import prng
from ig_jax.experiment import Experiment
from ig_jax.generation.plan import Plan, plan
from ig_jax.guidance import Guidances, Guided, GuideModel
from ig_jax.parallel import collectives
from ig_jax.parallel.mesh import BATCH, over_batch, replicated
from ig_jax.samplers import base
from ig_jax.samplers.base import Sampler
from ig_jax.types import DTYPES, Labels, Latents, Params, Scalar


def trajectory(
    guided: Guided, plan: Plan, shape: tuple[int, ...], seed: jax.Array, indices: jax.Array
) -> Latents:
    """Latents [b, *shape] of samples `indices` [b] under seed."""
    keys = prng.sample_keys(seed, indices)
    return base.sample(
        plan.sampler,
        np.array(plan.grid),
        guided.fields(plan.cut),
        prng.sample_normal(keys, shape, prng.LATENTS),
        lambda i: prng.sample_normal(keys, shape, prng.FIRST_STEP + i),
    )


def one_by_one(draw: Callable[[jax.Array, Labels], Latents]) -> Callable:
    """`draw(indices [b], labels [b])` so that every sample is a batch of its own."""

    def each(indices: jax.Array, y: Labels) -> Latents:
        return jax.vmap(lambda i, label: draw(i[None], label[None])[0])(indices, y)

    return each


class Generator:
    """Draws samples of one experiment; compiles a program for every plan it meets."""

    def __init__(
        self,
        exp: Experiment,
        worse: GuideModel | None = None,
        decode: Callable[[Latents], jax.Array] | None = None,
    ):
        """
        Args:
          exp: network, process, sampler, guidances.
          worse: what autoguidance extrapolates from; None where it is off.
          decode: from latents to what is returned; by default the codec's pictures.
        """
        self.exp, self.worse = exp, worse
        codec = exp.config.data.codec
        self._decode = codec.decode if decode is None else lambda x, weights: decode(x)
        whole, rows = replicated(exp.own_mesh), over_batch(exp.own_mesh)
        weights = codec.decoder_weights() if decode is None else {}
        self._codec_weights = jax.device_put(weights, whole)
        self._program = jax.jit(
            self._generate,
            static_argnums=0,
            in_shardings=(whole, whole, whole, whole, whole, rows, rows),
            out_shardings=(rows, rows),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what is returned."""
        latents = jax.ShapeDtypeStruct((1, *self.exp.net.latent_shape), jnp.float32)
        return jax.eval_shape(self._decode, latents, self._codec_weights).shape[1:]

    def _generate(self, plan: Plan, *given: Any) -> tuple[jax.Array, Bool[Array, "b"]]:
        """Every device draws its own rows, and none waits for another."""
        whole, rows = PartitionSpec(), PartitionSpec(BATCH)
        each = jax.shard_map(
            partial(self._rows, plan),
            mesh=self.exp.own_mesh,
            in_specs=(*[whole] * (len(given) - 2), rows, rows),
            out_specs=rows,
            check_vma=False,
        )
        return each(*given)

    def _rows(
        self,
        plan: Plan,
        params: Params,
        worse: Params | None,
        codec: Params,
        scales: Mapping[str, Scalar],
        seed: jax.Array,
        indices: jax.Array,
        y: Labels,
    ) -> tuple[jax.Array, Bool[Array, "b"]]:
        dtype = DTYPES[self.exp.config.model.dtype]
        params = collectives.as_computed(params, dtype)  # before the loop, not in every step of it

        def draw(indices: jax.Array, y: Labels) -> Latents:
            guided = Guided(
                net=self.exp.net,
                params=params,
                process=self.exp.config.process,
                y=y,
                null_class=self.exp.num_classes,
                scales=scales,
                channels=dict(plan.channels),
                readout=self.exp.config.readout,
                worse=self.worse and replace(self.worse, params=worse),
            )
            return trajectory(guided, plan, self.exp.net.latent_shape, seed, indices)

        latents = (one_by_one(draw) if plan.sampler.adaptive else draw)(indices, y)
        return self._decode(latents, codec), jnp.all(jnp.isfinite(latents), axis=(1, 2, 3))

    def __call__(
        self,
        params: Params,
        seed: jax.Array | np.ndarray | np.uint32,
        indices: jax.Array,
        y: Labels,
        guidances: Guidances | None = None,
        sampler: Sampler | None = None,
    ) -> tuple[jax.Array, Bool[Array, "b"]]:
        """Samples `indices` [b] with labels y [b]: decoded [b, ...], and which have finite latents.

        Args:
          params: of the network.
          seed: uint32; sample i depends on it and on i alone.
          indices, y: which samples, and their labels.
          guidances, sampler: others than the config's.
        """
        s = self.exp.config.sample
        guidances = s.guidances if guidances is None else guidances
        scales = {kind: np.float32(g.scale) for kind, g in guidances.items()}
        chosen = plan(self.exp.config, sampler or s.sampler, guidances)
        other = self.worse and self.worse.params
        return self._program(chosen, params, other, self._codec_weights, scales, seed, indices, y)
