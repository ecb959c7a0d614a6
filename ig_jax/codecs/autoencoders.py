"""The published autoencoders of ImageNet's latents, as a run's codec.

  name     stored                                     what the network sees        images
  sd_vae   mean and std of the posterior [h, w, 8]    0.18215 (mean + std n)       255 (x + 1) / 2
  va_vae   a latent and its flipped copy [h, w, 64]  (one of them - mean) / std   127.5 x + 128

How images become 8 bits is a setting, `rounding`: what the table says is its default. The rule
belongs to a model's published numbers, not to the autoencoder: the official SiT and DiT round up
from a half where SiT + IG, REPA and SRA cut, on the same latents.

The noise n and the choice of the twin are fresh in every step, from the run's seed. Where images
are stored, uint8 [H, W, 3], they are encoded in every step. A latent of one read by the other's
codec has another number of channels, and is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from ig_jax.bounds import unset
from ig_jax.codecs import sd_vae, to_uint8, va_vae
from ig_jax.codecs.base import mirror
from ig_jax.errors import UserError, shown
from ig_jax.io import state_dict
from ig_jax.io.paths import Location
from ig_jax.io.torch import file as torch_file
from ig_jax.types import DTYPES, NONE, Images, Key, Latents, Params

INPUT_RANGE = (-1.0, 1.0)  # of pixels, as both autoencoders see them
MOST_CHANNELS = 4096  # of latents whose statistics are read; published ones have 32
ENCODER, DECODER = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")


def are_images(stored_shape: tuple[int, ...]) -> bool:
    return len(stored_shape) == 3 and stored_shape[-1] == 3


def _is_per_channel(shape: tuple[int, ...] | None) -> bool:
    match shape:
        case (1, channels, 1, 1):
            return 1 <= channels <= MOST_CHANNELS
    return False


def _scaled(images: UInt8[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
    return images.astype(jnp.float32) / 127.5 - 1


@dataclass(frozen=True)
class Autoencoder(ABC):
    """Fields and rules that both share."""

    # published file; None: latents must be stored, images are in false colours
    weights: Location | None = unset("")
    # Of convolutions and matrix products: float32, bfloat16.
    dtype: str = "float32"
    # From decoded images to 8 bits: a rule of `to_uint8.ROUNDING_RULES`.
    rounding: str = to_uint8.TRUNCATED

    name: ClassVar[str]
    factor: ClassVar[int]  # pixels of an image per latent pixel, along a side

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {shown(self.dtype)}: must be one of {', '.join(DTYPES)}")
        if self.rounding not in to_uint8.ROUNDING_RULES:
            known = " or ".join(map(repr, to_uint8.ROUNDING_RULES))
            raise ValueError(f"rounding = {shown(self.rounding)}: must be {known}")

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of the latents."""

    @abstractmethod
    def from_published(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """All parameters from the state dict in the published file."""

    @abstractmethod
    def to_store(self, images: UInt8[Array, "b H W 3"], weights: Params, keys: Key) -> Latents:
        """Encodes images as a data set of latents stores them: float32 [b, h, w, 2 channels].

        `keys` [b] are for what is random about that, so that it does not depend on the batch.
        """

    @abstractmethod
    def sums(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of latents and of their squares over n, h and w, expected values: float64 [c].

        `stored` [n, h, w, 2 channels] is as `to_store` gives it.
        """

    def latent_shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        channels, sides = self.channels, stored_shape[:2]
        if are_images(stored_shape) and not any(side % self.factor for side in sides):
            return (sides[0] // self.factor, sides[1] // self.factor, channels)
        if len(stored_shape) != 3 or stored_shape[-1] != 2 * channels:
            raise ValueError(
                f"codec.name = {self.name!r}: reads latents [h, w, {2 * channels}] or images "
                f"[H, W, 3] with sides divisible by {self.factor}, but the source holds "
                f"{list(stored_shape)}; choose the codec that made these latents"
            )
        return (*sides, channels)

    def _read(self, parts: tuple[str, ...]) -> Params:
        try:
            state = state_dict.read(Path(self.weights), "data.codec.weights").state
            params = self.from_published(state)
        except ValueError as error:
            raise UserError(f"data.codec.weights = {shown(self.weights)}: {error}") from error
        return {name: params[name] for name in parts}

    def encoder_weights(self, stored_shape: tuple[int, ...]) -> Params:
        if not are_images(stored_shape):
            return {}
        if not self.weights:
            raise UserError(
                "data.codec.weights = None: encoding images needs the autoencoder; name its "
                "published file, or a source of latents"
            )
        return self._read(ENCODER)

    def turned(self, key: Key, rows: int) -> Bool[Array, "b"]:
        return jnp.zeros(rows, bool)

    def decoder_weights(self) -> Params:
        return self._read(DECODER) if self.weights else {}


@dataclass(frozen=True)
class SdVae(Autoencoder):
    """Latents of the Stable Diffusion autoencoder (SiT, DiT).

    Its published file is diffusion_pytorch_model.safetensors.
    """

    name: ClassVar[str] = "sd_vae"
    factor: ClassVar[int] = 8
    channels: ClassVar[int] = 4

    def from_published(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return sd_vae.from_published(state)

    def to_store(self, images: UInt8[Array, "b H W 3"], weights: Params, keys: Key) -> Latents:
        """Mean and standard deviation of the posterior, neither scaled nor drawn from."""
        posterior = sd_vae.encode(weights, _scaled(images), dtype=DTYPES[self.dtype])
        return jnp.concatenate(posterior, axis=-1)

    def sums(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = np.split(stored.astype(np.float64), 2, axis=-1)
        return mean.sum((0, 1, 2)), (mean**2 + std**2).sum((0, 1, 2))

    def latent(
        self,
        stored: Array,
        key: Key,
        weights: Params = NONE,
        mirrored: Bool[Array, "b"] | None = None,
    ) -> Latents:
        """As `Codec.latent`: None mirrors nothing; a mirrored latent stands for that of a mirror
        image, which the autoencoder gives nearly."""
        stored = mirror(stored, mirrored)
        if are_images(stored.shape[1:]):
            stored = self.to_store(stored, weights, key)
        mean, std = jnp.split(stored, 2, axis=-1)
        return sd_vae.SCALE * (mean + std * jax.random.normal(key, mean.shape, mean.dtype))

    def decode(self, x: Latents, weights: Params = NONE) -> Images:
        if not weights:
            return to_uint8.false_colours(x)
        out = sd_vae.decode(weights, x / sd_vae.SCALE, dtype=DTYPES[self.dtype])
        return to_uint8.ROUNDING_RULES[self.rounding](out)


@dataclass(frozen=True)
class VaVae(Autoencoder):
    """Latents of VA-VAE (LightningDiT).

    Its published file is vavae-imagenet256-f16d32-dinov2.pt.
    """

    rounding: str = to_uint8.ROUNDED
    # latents_stats.pt: mean and std of every channel; None: not known, as before latents are made
    statistics: Location | None = unset("", None)

    name: ClassVar[str] = "va_vae"
    factor: ClassVar[int] = 16

    @property
    def channels(self) -> int:
        return self._statistics[0].size if self.statistics else 32

    def latent_shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        latents = len(stored_shape) == 3 and not are_images(stored_shape)
        if self.statistics and latents and stored_shape[-1] != 2 * self.channels:
            raise ValueError(
                f"codec.statistics = {shown(self.statistics)}: are of {self.channels} channels, "
                f"but the source holds {list(stored_shape)}, two latents of "
                f"{stored_shape[-1] // 2}; name the latents_stats.pt of these latents"
            )
        return super().latent_shape(stored_shape)

    def from_published(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return va_vae.from_published(state)

    @cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float32 [1, 1, 1, c]."""
        file = Path(self.statistics or "")
        if not file.is_file():
            raise UserError(
                f"data.codec.statistics = {shown(self.statistics)}: no such file; it lies beside "
                "the latents as latents_stats.pt"
            )
        content = torch_file.load(file)
        both = [
            content.get(name) if isinstance(content, dict) else None for name in ("mean", "std")
        ]
        shapes = [np.shape(array) if isinstance(array, np.ndarray) else None for array in both]
        if shapes[0] != shapes[1] or not _is_per_channel(shapes[0]):
            raise UserError(
                f"data.codec.statistics = {shown(self.statistics)}: mean and std have shapes "
                f"{shapes}, not (1, c, 1, 1) of at most {MOST_CHANNELS} channels; name the "
                "latents_stats.pt of these latents"
            )
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            mean, std = (array.astype(np.float32).reshape(1, 1, 1, -1) for array in both)
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise UserError(
                f"data.codec.statistics = {shown(self.statistics)}: mean and std must be finite, "
                "and std positive; name the latents_stats.pt of these latents"
            )
        return mean, std

    @property
    def statistics_per_channel(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and standard deviation [c]; None where they are not known."""
        if not self.statistics:
            return None
        mean, std = self._statistics
        return mean.reshape(-1), std.reshape(-1)

    def _draw(self, images: UInt8[Array, "b H W 3"], weights: Params, keys: Key) -> Latents:
        mean, std = va_vae.encode(weights, _scaled(images), dtype=DTYPES[self.dtype])
        noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:], mean.dtype))(keys)
        return mean + std * noise

    def to_store(self, images: UInt8[Array, "b H W 3"], weights: Params, keys: Key) -> Latents:
        """A draw from the posterior of the image, and one from that of its mirror image."""
        # Side by side in the batch: each device then has both twins of its own images.
        both = jnp.stack([images, images[:, :, ::-1]], axis=1)
        keys = jax.vmap(jax.random.split)(keys)
        draws = self._draw(both.reshape(-1, *images.shape[1:]), weights, keys.reshape(-1))
        twins = draws.reshape(-1, 2, *draws.shape[1:])
        return jnp.concatenate([twins[:, 0], twins[:, 1]], axis=-1)

    def sums(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Without the mirrored twins, as the published statistics are taken."""
        plain = np.split(stored.astype(np.float64), 2, axis=-1)[0]
        return plain.sum((0, 1, 2)), (plain**2).sum((0, 1, 2))

    def latent(
        self,
        stored: Array,
        key: Key,
        weights: Params = NONE,
        mirrored: Bool[Array, "b"] | None = None,
    ) -> Latents:
        """As `Codec.latent`: None mirrors half of the examples at random."""
        mean, std = self._statistics
        if mirrored is None:
            mirrored = self.turned(key, len(stored))
        if are_images(stored.shape[1:]):
            images = mirror(stored, mirrored)
            keys = jax.random.split(jax.random.fold_in(key, 1), len(stored))
            return (self._draw(images, weights, keys) - mean) / std
        plain, twin = jnp.split(stored, 2, axis=-1)
        return (jnp.where(mirrored[:, None, None, None], twin, plain) - mean) / std

    def turned(self, key: Key, rows: int) -> Bool[Array, "b"]:
        return jax.random.bernoulli(key, shape=(rows,))

    def decode(self, x: Latents, weights: Params = NONE) -> Images:
        if not weights:
            return to_uint8.false_colours(x)
        mean, std = self._statistics
        out = va_vae.decode(weights, x * std + mean, dtype=DTYPES[self.dtype])
        return to_uint8.ROUNDING_RULES[self.rounding](out)
