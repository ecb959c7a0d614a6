"""A trained network with all that sampling from it and looking into it need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from ig_jax import prng
from ig_jax.config.schema import Sample
from ig_jax.errors import UserError, shown
from ig_jax.generation import requests
from ig_jax.generation.batches import outputs
from ig_jax.generation.generator import Generator
from ig_jax.guidance import Guidances, GuideModel
from ig_jax.parallel.mesh import to_host
from ig_jax.samplers import base as samplers
from ig_jax.samplers.base import Sampler
from ig_jax.types import DTYPES, Codec, Labels, Latents, NetFn, Params, Process, Tokens


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A network, its parameters, and what its predictions mean.

    Made by `ig_jax.load`, or from an experiment. Time runs from 0 (data) to 1 (noise), velocities
    point to noise, latents are channels last. Calls compile once for each batch shape and setting;
    scales of guidance cost no compilation.

    Attributes:
      net: the network, a pure function of parameters and inputs.
      params: its parameters, whole on each device of this process; abstract while a run trains.
      process: what its predictions mean.
      codec: from stored data to latents, and from latents to images.
      num_classes: the label of that number is the null class.
      sampling: sampler, guidances, labels and batch size, where a call names no others.
      mesh: all devices of the job.
      has_null_class: whether it was trained with dropped labels, as CFG needs.
    """

    net: NetFn
    params: Params = field(repr=False)
    process: Process
    codec: Codec
    num_classes: int
    sampling: Sample
    mesh: Mesh = field(repr=False)
    has_null_class: bool = True

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a latent."""
        return self.net.latent_shape

    @property
    def guide_model(self) -> GuideModel:
        """This network as the one that another is guided away from (autoguidance)."""
        return GuideModel(self.net, self.process, self.params)

    def generator(
        self,
        *,
        guide: GuideModel | None = None,
        decode: Callable[[Latents], Array] | None = None,
    ) -> Generator:
        """The compiled programs that sample from this network; see `Generator`."""
        parts = (self.net, self.process, self.codec, self.num_classes, self.sampling, self.mesh)
        return Generator(*parts, guide=guide, decode=decode)

    def sample(
        self, labels: Sequence[int] | np.ndarray | None = None, **settings: Any
    ) -> UInt8[np.ndarray, "n H W c"]:
        """Images of the given classes.

        Args:
          labels: classes [n], `num_classes` for the null class; None draws `num` by the run's
            `sample.labels`.
          settings: see `sample_latents`.

        Raises:
          UserError: a setting is unknown or does not fit this network; a sample is not finite.
        """
        images, _ = self._sample(labels, None, **settings)
        return images

    def sample_latents(
        self, labels: Sequence[int] | np.ndarray | None = None, **settings: Any
    ) -> Any:
        """Latents float32 [n, h, w, c] of the given classes.

        Args:
          labels: as for `sample`.
          num: how many, where no labels are given.
          seed: sample i depends on it and on i alone.
          noise: initial noise float32 [n, h, w, c], in place of that drawn from seed and index.
          ig, cfg, autoguidance: a scale (1 is off), or (scale, low, high) with the interval of
            times in which the guidance is on; the run's where none is given.
          readout: depth of the readout that IG extrapolates from; the run's where none is given.
          guide: the pipeline that autoguidance extrapolates from.
          sampler: a name of `SAMPLERS`, or a sampler; the run's where none is given.
          steps: of the sampler.
          dtype: of the network's matrix products: 'float32' or 'bfloat16'.
          trajectory: whether to return the latents after each step, too.

        Returns:
          The latents; with `trajectory` also float32 [n, steps, h, w, c], whose last are they.

        Raises:
          UserError: a setting is unknown or does not fit this network; a sample is not finite.
        """
        latents, states = self._sample(labels, _identity, **settings)
        return (latents, states) if settings.get("trajectory") else latents

    def _sample(
        self,
        labels: Sequence[int] | np.ndarray | None,
        decode: Callable[[Latents], Array] | None,
        *,
        num: int | None = None,
        seed: int = 0,
        noise: np.ndarray | Array | None = None,
        ig: requests.GuidanceRequest = None,
        cfg: requests.GuidanceRequest = None,
        autoguidance: requests.GuidanceRequest = None,
        readout: int | None = None,
        guide: Pipeline | None = None,
        sampler: str | Sampler | None = None,
        steps: int | None = None,
        dtype: str | None = None,
        trajectory: bool = False,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        scales = {"ig": ig, "cfg": cfg, "autoguidance": autoguidance}
        guidances = requests.guidances(self.sampling, scales, guided=guide is not None)
        self._check_guidances(guidances, guide)
        requests.require_readout(self.net.settings.readouts, readout)
        chosen = requests.sampler(self.sampling, sampler, steps)
        self._check_sampler(chosen)
        y = requests.labels(self.sampling, self.num_classes, labels, num, seed)
        if noise is not None and noise.shape != (len(y), *self.latent_shape):
            raise UserError(
                f"noise: has shape {shown(noise.shape)}, must be {(len(y), *self.latent_shape)}, "
                "one latent for each label"
            )
        pipe = self if dtype is None else self._computed_in(dtype)
        generator = pipe._cached_generator(decode, guide)
        # Small calls are batches of their own size, as far as it divides over the devices.
        devices = generator.mesh.size
        size = -(-min(len(y), generator.batch_size) // devices) * devices
        parts = [
            out
            for _, out in outputs(
                generator,
                self.params,
                seed,
                np.arange(len(y)),
                y,
                None if noise is None else np.asarray(noise, np.float32),
                size=size,
                guidances=guidances,
                sampler=chosen,
                readout=readout,
                trajectory=trajectory,
            )
        ]
        states = np.concatenate([out.trajectory for out in parts]) if trajectory else None
        return np.concatenate([out.decoded for out in parts]), states

    def _check_guidances(self, guidances: Guidances, guide: Pipeline | None) -> None:
        """Raises UserError for a guidance that this network cannot have."""
        if guidances["ig"].scale != 1 and not self.net.settings.readouts:
            raise UserError(
                f"ig = {guidances['ig'].scale:g}: this network has no intermediate readout; name "
                "its depth on loading a published file (readout_depth), or set the scale to 1"
            )
        if guidances["cfg"].scale != 1 and not self.has_null_class:
            raise UserError(
                f"cfg = {guidances['cfg'].scale:g}: this network was trained without a null class; "
                "set the scale to 1"
            )
        if guide is not None:
            require_same_data(self, guide, "guide")

    def _check_sampler(self, sampler: Sampler) -> None:
        """Raises UserError for a sampler that this network cannot have."""
        variance = self.net.family.outputs > 1
        try:
            samplers.check(sampler, self.process, predicts_variance=variance)
        except ValueError as error:
            raise UserError(f"sampler: {error}") from error
        try:
            self.sampling.null_class.check(sampler.adaptive)
            self.sampling.token_groups.check(sampler, self.net.settings.num_tokens(self.net.side))
        except ValueError as error:
            raise UserError(f"sample.{error}") from error

    def _computed_in(self, dtype: str) -> Pipeline:
        """The same network with matrix products in another dtype."""
        if dtype not in DTYPES:
            raise UserError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
        if dtype not in self._others:
            net = replace(self.net, settings=replace(self.net.settings, dtype=dtype))
            self._others[dtype] = replace(self, net=net)
        return self._others[dtype]

    @cached_property
    def _others(self) -> dict[str, Pipeline]:
        """By dtype."""
        return {}

    @cached_property
    def _generators(self) -> dict[Any, Generator]:
        """By what they decode to and are guided by; each holds its compiled programs."""
        return {}

    def _cached_generator(
        self, decode: Callable[[Latents], Array] | None, guide: Pipeline | None
    ) -> Generator:
        key = (decode, guide)  # which keeps the guide: another must not take its place
        if key not in self._generators:
            model = None if guide is None else guide.guide_model
            self._generators[key] = self.generator(guide=model, decode=decode)
        return self._generators[key]

    def velocity(
        self, x: Any, t: Any, labels: Sequence[int] | np.ndarray
    ) -> tuple[Latents, dict[int, Latents]]:
        """The velocity dx/dt at one point, with that of every readout.

        Args:
          x: noisy latents float32 [n, h, w, c].
          t: time in [0, 1], one for all or [n].
          labels: classes [n].

        Returns:
          Velocity float32 [n, h, w, c], and {depth of the readout: velocity}.
        """
        x, y = jnp.asarray(x, jnp.float32), jnp.asarray(self._classes(labels))
        return self._velocity(self.params, x, self._times(t, len(x)), y)

    @cached_property
    def _velocity(self) -> Callable[..., tuple[Latents, dict[int, Latents]]]:
        def velocity(
            params: Params, x: Latents, t: Array, y: Labels
        ) -> tuple[Latents, dict[int, Latents]]:
            out = self.net(params, x, self.process.condition_time(t), y)
            early = {depth: self.process.velocity(p, x, t) for depth, p in out.heads.items()}
            return self.process.velocity(out.pred, x, t), early

        return jax.jit(velocity)

    def features(
        self,
        images: Any,
        t: Any,
        depths: Sequence[int],
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        seed: int = 0,
        noise: np.ndarray | Array | None = None,
    ) -> dict[int, Tokens]:
        """Tokens of images at a noise level, by depth.

        Args:
          images: uint8 [n, H, W, c], or latents float32 [n, h, w, c].
          t: time in [0, 1], one for all or [n]; 0 adds no noise.
          depths: of the blocks, from 1, after which tokens are taken.
          labels: classes [n]; the null class by default.
          seed: of the noise.
          noise: float32 [n, h, w, c], in place of that drawn from seed and index.

        Returns:
          {depth: float32 [n, tokens, width]}.

        Raises:
          UserError: a depth that the network does not have; images that it cannot see; noise of
            another shape.
        """
        known = self.net.settings.depth
        for depth in depths:
            if not 1 <= depth <= known:
                raise UserError(f"depths = {shown(depths)}: must lie in 1..{known}")
        images = np.asarray(images)
        x0 = self.encode(images, seed=seed) if images.dtype == np.uint8 else jnp.asarray(images)
        null = np.full(len(x0), self.num_classes)
        y = jnp.asarray(self._classes(null if labels is None else labels))
        t = self._times(t, len(x0))
        if noise is None:
            noise = self._noise(np.uint32(seed), len(x0))
        elif noise.shape != x0.shape:
            raise UserError(
                f"noise: has shape {shown(noise.shape)}, must be {x0.shape}, as the latents"
            )
        return self._features(tuple(depths), self.params, x0, t, y, jnp.asarray(noise))

    @cached_property
    def _noise(self) -> Callable[[Array, int], Latents]:
        def draw(seed: Array, n: int) -> Latents:
            keys = prng.keys(seed, "features", jnp.arange(n))
            return prng.sample_normal(keys, self.latent_shape, 0)

        return jax.jit(draw, static_argnums=1)

    @cached_property
    def _features(self) -> Callable[..., dict[int, Tokens]]:
        def features(
            depths: tuple[int, ...],
            params: Params,
            x0: Latents,
            t: Array,
            y: Labels,
            noise: Latents,
        ) -> dict[int, Tokens]:
            x = self.process.perturb(x0, noise, t)
            return self.net.tokens(params, x, self.process.condition_time(t), y, depths)

        return jax.jit(features, static_argnums=0)

    def _classes(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        return requests.labels(self.sampling, self.num_classes, labels, None, 0)

    def _times(self, t: Any, n: int) -> Array:
        times = np.broadcast_to(np.asarray(t, np.float32), (n,))
        if not np.all((times >= 0) & (times <= 1)):
            raise UserError(f"t = {shown(t)}: must lie in [0, 1]; 0 is data, 1 is noise")
        return jnp.asarray(times)

    def encode(self, images: Any, *, seed: int = 0) -> Latents:
        """Latents float32 [n, h, w, c] of images uint8 [n, H, W, c]; `seed` where it is random."""
        images = np.asarray(images)
        shape = self._shape_of_latents(images.shape[1:]) if images.ndim == 4 else None
        if images.dtype != np.uint8 or shape != self.latent_shape:
            raise UserError(
                f"images: {images.dtype} of shape {shown(images.shape)} become no latents of shape "
                f"{self.latent_shape}; must be uint8 [n, height, width, channels], of the size "
                "that this network was trained on"
            )
        weights = self._encoder_weights(images.shape[1:])
        latents = self._encode(images, prng.key(seed, "codec"), weights)
        if not jnp.issubdtype(latents.dtype, jnp.floating):
            raise UserError("images: this network's codec encodes none; give latents, float32")
        return latents

    def _shape_of_latents(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        try:
            return self.codec.latent_shape(stored)
        except ValueError:
            return None

    @cached_property
    def _encode(self) -> Callable[..., Latents]:
        return jax.jit(lambda images, key, weights: self.codec.latent(images, key, weights))

    def _encoder_weights(self, shape: tuple[int, ...]) -> Params:
        if shape not in self._encoders:
            self._encoders[shape] = jax.device_put(self.codec.encoder_weights(shape))
        return self._encoders[shape]

    @cached_property
    def _encoders(self) -> dict[tuple[int, ...], Params]:
        """Weights of the encoder by the shape of an image."""
        return {}

    def decode(self, latents: Any) -> UInt8[np.ndarray, "n H W c"]:
        """Images of latents float32 [n, h, w, c], by the codec's rule of rounding."""
        return to_host(self._decode(jnp.asarray(latents, jnp.float32), self._decoder_weights))

    @cached_property
    def _decoder_weights(self) -> Params:
        return jax.device_put(self.codec.decoder_weights())

    @cached_property
    def _decode(self) -> Callable[..., Array]:
        return jax.jit(partial(_decode, self.codec))


def _decode(codec: Codec, latents: Float[Array, "n h w c"], weights: Params) -> Array:
    return codec.decode(latents, weights)


def _identity(latents: Latents) -> Latents:
    return latents


def require_same_data(here: Pipeline, there: Pipeline, field: str) -> None:
    """Raises UserError unless both networks know the same data, and the same path to noise."""
    for what, ours, theirs in (
        ("latents", here.latent_shape, there.latent_shape),
        ("classes", here.num_classes, there.num_classes),
        ("process.path", here.process.path, there.process.path),
    ):
        if ours != theirs:
            raise UserError(
                f"{field}: its {what} are {theirs}, this run's {ours}; autoguidance needs two "
                "networks of the same data and path"
            )
