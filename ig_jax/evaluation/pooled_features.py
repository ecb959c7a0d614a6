"""Features of images by noise level and block: tokens of a frozen network, pooled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from ig_jax import prng
from ig_jax.config.probe import Probe
from ig_jax.errors import UserError
from ig_jax.metrics.linear_probe import Features
from ig_jax.parallel.collectives import as_computed
from ig_jax.parallel.mesh import BATCH, replicated
from ig_jax.pipeline import Pipeline
from ig_jax.types import DTYPES, Key, Labels, Latents, Params, Tokens

Rows = Mapping[str, Array]  # of images: 'stored' [b, ...], 'label' [b], 'number' [b]
# (inputs, rows, step) -> features. The inputs are what it reads on the devices, such as parameters;
# step 0 is evaluation, without augmentation, where an image's noise depends on its number alone.
FeatureFn = Callable[[Any, Rows, Int[Array, ""]], Features]
# (times, blocks) -> the function that gives their features.
FeaturesAt = Callable[[Sequence[float], Sequence[int]], FeatureFn]

POOL = {"mean": jnp.mean, "max": jnp.max}


def inputs_of(pipeline: Pipeline, stored_shape: tuple[int, ...], mesh: Mesh) -> dict[str, Params]:
    """Inputs of `features_at`: parameters in the type that computes with them, and the encoder's.

    Raises:
      UserError: images are stored, and the codec's file is not named or cannot be read.
    """
    dtype = DTYPES[pipeline.net.settings.dtype]
    encoder = pipeline.codec.encoder_weights(stored_shape)
    inputs = {"network": as_computed(pipeline.params, dtype), "encoder": encoder}
    return jax.device_put(inputs, replicated(mesh))


def features_at(pipeline: Pipeline, settings: Probe, mesh: Mesh) -> FeaturesAt:
    """Pooled tokens of a pipeline's network after each block at each noise level.

    The network is evaluated once for each level; at a level, every image has noise of its own.

    Raises:
      UserError: labels are null, and the network has no null class.
    """
    if settings.labels == "null" and not pipeline.has_null_class:
        raise UserError(
            "probe.labels = 'null': this network was trained without a null class; set it to 'true'"
        )

    def at(times: Sequence[float], blocks: Sequence[int]) -> FeatureFn:
        # By their place among all levels, so that a level has its noise whichever are asked for.
        addresses = jnp.asarray([settings.times.index(t) for t in times], jnp.uint32)
        levels = jnp.asarray(times, jnp.float32), addresses

        def on_one_device(params: Params, x0: Latents, y: Labels, keys: Key) -> Features:
            def at_level(level: tuple[Array, Array]) -> Float[Array, "l b d"]:
                t = jnp.full(len(x0), level[0])
                noise = prng.sample_normal(keys, x0.shape[1:], level[1])
                x = pipeline.process.perturb(x0, noise, t)
                condition = pipeline.process.condition_time(t)
                tokens = pipeline.net.tokens(params, x, condition, y, tuple(blocks))
                return jnp.stack([_pooled(tokens[block], settings.pooling) for block in blocks])

            return lax.map(at_level, levels)

        whole, rows = PartitionSpec(), PartitionSpec(BATCH)
        each = jax.shard_map(
            on_one_device,
            mesh=mesh,
            in_specs=(whole, rows, rows, rows),
            out_specs=PartitionSpec(None, None, BATCH),
        )

        def features(inputs: Any, batch: Rows, step: Int[Array, ""]) -> Features:
            keys = _keys(settings.seed, "probe", step, batch["number"])
            x0 = _latents(pipeline, settings, inputs["encoder"], batch, step)
            labels = batch["label"]
            y = labels if settings.labels == "true" else jnp.full_like(labels, pipeline.num_classes)
            return each(inputs["network"], x0, y, keys)

        return features

    return at


def _pooled(tokens: Tokens, pooling: str) -> Float[Array, "b d"]:
    return POOL[pooling](tokens, axis=1)


def _keys(seed: int, stream: str, step: Int[Array, ""], numbers: Int[Array, "b"]) -> Key:
    root = prng.key(seed, stream, step)
    return jax.vmap(lambda number: jax.random.fold_in(root, number))(numbers)


def _latents(
    pipeline: Pipeline, settings: Probe, encoder: Params, batch: Rows, step: Int[Array, ""]
) -> Latents:
    """Latents of stored examples; while training and with `flip`, half of them mirrored."""
    keys = _keys(settings.seed, "probe flip", step, batch["number"])
    mirrored = jax.vmap(jax.random.bernoulli)(keys) & (step > 0) & settings.flip
    key = prng.key(settings.seed, "probe codec", step)
    key = jax.random.fold_in(key, batch["number"][0])  # another one for each batch of evaluation
    return pipeline.codec.latent(batch["stored"], key, encoder, mirrored)
