"""Compiled programs from noise to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from ig_jax import prng
from ig_jax.config.schema import Sample
from ig_jax.generation.plan import Plan, plan
from ig_jax.guidance import Guidances, Guided, GuideModel
from ig_jax.models import trunk
from ig_jax.parallel import collectives
from ig_jax.parallel.mesh import BATCH, local_mesh, over_batch, replicated
from ig_jax.samplers import base
from ig_jax.samplers.base import Sampler
from ig_jax.types import DTYPES, Codec, Labels, Latents, NetFn, Params, Process, Scalar, TokenGroups


class Output(NamedTuple):
    """A batch of samples on the devices."""

    decoded: Array  # [b, ...], what the generator's `decode` makes of the latents
    finite: Bool[Array, "b"]  # whether all latents are finite
    trajectory: Float[Array, "b steps h w c"] | None = None  # latents after each step


def from_noise(
    guided: Guided,
    plan: Plan,
    shape: tuple[int, ...],
    seed: jax.Array,
    indices: jax.Array,
    noise: Latents | None = None,
    *,
    trajectory: bool = False,
) -> tuple[Latents, Float[Array, "steps b h w c"] | None]:
    """Latents [b, *shape] of samples `indices` [b] under seed, from `noise` if it is given."""
    keys = prng.sample_keys(seed, indices)
    return base.integrate(
        plan.sampler,
        np.array(plan.grid),
        guided.fields(plan.segments),
        prng.sample_normal(keys, shape, prng.LATENTS) if noise is None else noise,
        lambda i: prng.sample_normal(keys, shape, prng.FIRST_STEP + i),
        trajectory=trajectory,
    )


def one_by_one(draw: Callable[..., Any]) -> Callable[..., Any]:
    """`draw(*rows [b, ...])` so that every sample is a batch of its own."""

    def single(*rows: Array) -> Any:
        latents, states = draw(*(row[None] for row in rows))
        return latents[0], None if states is None else states[:, 0]

    def each(*rows: Array) -> Any:
        latents, states = jax.vmap(single)(*rows)
        return latents, None if states is None else states.swapaxes(0, 1)

    return each


class Generator:
    """Samples from one network; compiles a program for every plan and batch shape it meets."""

    def __init__(
        self,
        net: NetFn,
        process: Process,
        codec: Codec,
        num_classes: int,
        sampling: Sample,
        mesh: Mesh,
        *,
        guide: GuideModel | None = None,
        decode: Callable[[Latents], Array] | None = None,
    ):
        """
        Args:
          net: the network.
          process: what its predictions mean.
          codec: from latents to images.
          num_classes: the label of that number is the null class.
          sampling: sampler, guidances, labels and batch size, where a call names no others.
          mesh: all devices of the job; this process samples on its own.
          guide: what autoguidance extrapolates from; None where it is off.
          decode: from latents to what is returned; by default the codec's images.
        """
        self.net, self.process, self.codec = net, process, codec
        self.num_classes, self.sampling, self.guide = num_classes, sampling, guide
        self.mesh = local_mesh(mesh)
        # This process's part of a batch.
        self.batch_size = sampling.batch_size * self.mesh.size // mesh.size
        self._decode = codec.decode if decode is None else lambda x, weights: decode(x)
        whole, rows = replicated(self.mesh), over_batch(self.mesh)
        weights = codec.decoder_weights() if decode is None else {}
        self._codec_weights = jax.device_put(weights, whole)
        self._program = trunk.jit(
            self._generate,
            static_argnums=(0, 1),
            in_shardings=(whole, whole, whole, whole, whole, rows, rows, rows),
            out_shardings=rows,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what is returned."""
        latents = jax.ShapeDtypeStruct((1, *self.net.latent_shape), jnp.float32)
        return jax.eval_shape(self._decode, latents, self._codec_weights).shape[1:]

    @property
    def readout(self) -> int | None:
        """Depth of the readout that Internal Guidance extrapolates from; None without one."""
        readouts = self.net.settings.readouts
        return self.sampling.readout or (readouts[0] if readouts else None)

    def plan(
        self,
        guidances: Guidances | None = None,
        sampler: Sampler | None = None,
        readout: int | None = None,
    ) -> Plan:
        """The plan of guidances, sampler and readout, by default those of `sampling`."""
        s = self.sampling
        guidances = s.guidances if guidances is None else guidances
        chosen = self.readout if readout is None else readout
        sampler = sampler or s.sampler
        return plan(self.process, sampler, guidances, s.time_shift, chosen, s.null_class)

    def _generate(self, plan: Plan, trajectory: bool, *arguments: Any) -> Output:
        """Every device samples its own rows, and none waits for another."""
        whole, rows = PartitionSpec(), PartitionSpec(BATCH)
        each = jax.shard_map(
            partial(self._rows, plan, trajectory),
            mesh=self.mesh,
            in_specs=(*[whole] * (len(arguments) - 3), rows, rows, rows),
            out_specs=rows,
            check_vma=False,
        )
        return each(*arguments)

    def _rows(
        self,
        plan: Plan,
        trajectory: bool,
        params: Params,
        guide: Params | None,
        codec: Params,
        scales: Mapping[str, Scalar],
        seed: jax.Array,
        indices: jax.Array,
        y: Labels,
        noise: Latents | None,
    ) -> Output:
        dtype = DTYPES[self.net.settings.dtype]
        params = collectives.as_computed(params, dtype)  # before the loop, not in every step of it

        def draw(indices: jax.Array, y: Labels, *noise: Latents) -> Any:
            guided = Guided(
                net=self.net,
                params=params,
                process=self.process,
                y=y,
                null_class=self.num_classes,
                scales=scales,
                channels=dict(plan.channels),
                readout=plan.readout,
                null=plan.null,
                guide=self.guide and replace(self.guide, params=guide),
                **self._groups(seed, indices),
            )
            shape = self.net.latent_shape
            return from_noise(guided, plan, shape, seed, indices, *noise, trajectory=trajectory)

        arguments = (indices, y) if noise is None else (indices, y, noise)
        latents, states = (one_by_one(draw) if plan.sampler.adaptive else draw)(*arguments)
        finite = jnp.all(jnp.isfinite(latents), axis=(1, 2, 3))
        states = None if states is None else states.swapaxes(0, 1)
        return Output(self._decode(latents, codec), finite, states)

    def _groups(self, seed: jax.Array, indices: jax.Array) -> dict[str, Any]:
        """The groups of tokens of samples `indices`, as `Guided` takes them; {} for none."""
        groups = self.sampling.token_groups
        if not groups.share:
            return {}
        keys = prng.keys(seed, "token groups", indices)
        tokens = self.net.settings.num_tokens(self.net.side)

        def of_step(i: Array | int) -> TokenGroups:
            return groups.of_network(prng.sample_normal(keys, (tokens,), i))

        return {"groups_of_step": of_step} if groups.each_step else {"groups": of_step(0)}

    def __call__(
        self,
        params: Params,
        seed: jax.Array | np.ndarray | np.uint32,
        indices: jax.Array,
        y: Labels,
        noise: Latents | None = None,
        *,
        guidances: Guidances | None = None,
        sampler: Sampler | None = None,
        readout: int | None = None,
        trajectory: bool = False,
    ) -> Output:
        """Samples `indices` [b] with labels y [b].

        Args:
          params: of the network.
          seed: uint32; sample i depends on it and on i alone.
          indices, y: which samples, and their labels.
          noise: initial noise [b, h, w, c] in place of that drawn from seed and index.
          guidances, sampler, readout: others than those of `sampling`.
          trajectory: whether to return the latents after each step, too.
        """
        chosen, whole = self._prepared(params, seed, guidances, sampler, readout)
        return self._program(chosen, trajectory, *whole, indices, y, noise)

    def trace(
        self,
        params: Params,
        seed: jax.Array,
        indices: jax.Array,
        y: Labels,
        guidances: Guidances | None = None,
    ) -> jax.stages.Traced:
        """The program of such a call, whose arguments may be abstract."""
        chosen, whole = self._prepared(params, seed, guidances)
        return self._program.trace(chosen, False, *whole, indices, y, None)

    def _prepared(
        self,
        params: Params,
        seed: Any,
        guidances: Guidances | None,
        sampler: Sampler | None = None,
        readout: int | None = None,
    ) -> tuple[Plan, tuple[Any, ...]]:
        """The plan of a call, and the arguments of its program that every device has whole."""
        guidances = self.sampling.guidances if guidances is None else guidances
        scales = {kind: np.float32(g.scale) for kind, g in guidances.items()}
        chosen, guide = self.plan(guidances, sampler, readout), self.guide and self.guide.params
        return chosen, (params, guide, self._codec_weights, scales, seed)
