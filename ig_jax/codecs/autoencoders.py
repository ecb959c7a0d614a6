"""The published latents of ImageNet and the autoencoders behind them, as a run's codec.

  name     stored                                     what the network sees        pictures
  sd_vae   mean and std of the posterior [h, w, 8]    0.18215 (mean + std n)       255 (x + 1) / 2
  va_vae   a latent and its mirrored twin [h, w, 64]  (one of them - mean) / std   127.5 x + 128

The noise n and the choice of the twin are fresh in every step, from the run's seed. A latent of one
read by the other's codec has another number of channels, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ig_jax.codecs import pixels, sd_vae, va_vae
from ig_jax.errors import UserError
from ig_jax.formats import state_dict, torch_file
from ig_jax.types import NONE, Images, Key, Latents, Params


def _half(stored_shape: tuple[int, ...], channels: int, name: str) -> tuple[int, int, int]:
    """The latents' shape where two arrays of them are stored one behind the other."""
    if len(stored_shape) != 3 or stored_shape[-1] != 2 * channels:
        raise ValueError(
            f"codec.name = {name!r}: reads [h, w, {2 * channels}], but the source holds "
            f"{list(stored_shape)}; choose the codec that made these latents"
        )
    return (*stored_shape[:2], channels)


def _decoder(file: str, from_published: Callable[[Mapping[str, np.ndarray]], Params]) -> Params:
    """What decoding reads of the weights in `file`; {} where no file is named."""
    if not file:
        return {}
    try:
        params = from_published(state_dict.read(Path(file), "data.codec.decoder").state)
    except ValueError as error:
        raise UserError(f"data.codec.decoder = {file!r}: {error}") from error
    return {name: params[name] for name in ("post_quant_conv", "decoder")}


@dataclass(frozen=True)
class SdVae:
    """Latents of the Stable Diffusion autoencoder, 4 channels, factor 8 (SiT, DiT)."""

    decoder: str  # published diffusion_pytorch_model.safetensors; '': pictures in false colours

    def latent_shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        return _half(stored_shape, 4, "sd_vae")

    def latent(self, stored: Array, key: Key) -> Latents:
        mean, std = jnp.split(stored, 2, axis=-1)
        return sd_vae.SCALE * (mean + std * jax.random.normal(key, mean.shape, mean.dtype))

    def weights(self) -> Params:
        return _decoder(self.decoder, sd_vae.from_published)

    def decode(self, x: Latents, weights: Params = NONE) -> Images:
        if not weights:
            return pixels.false_colours(x)
        return pixels.to_uint8_truncated(sd_vae.decode(weights, x / sd_vae.SCALE))


@dataclass(frozen=True)
class VaVae:
    """Latents of VA-VAE, 32 channels, factor 16 (LightningDiT)."""

    statistics: str  # published latents_stats.pt: mean and std of every channel
    decoder: str  # published vavae-imagenet256-f16d32-dinov2.pt; '': pictures in false colours

    def latent_shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]:
        return _half(stored_shape, self._statistics[0].size, "va_vae")

    @cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation, float32 [1, 1, 1, c]."""
        file = Path(self.statistics)
        if not file.is_file():
            raise UserError(
                f"data.codec.statistics = {self.statistics!r}: no such file; it lies beside the "
                "published latents as latents_stats.pt"
            )
        found = torch_file.load(file)
        both = [found.get(name) if isinstance(found, dict) else None for name in ("mean", "std")]
        shapes = [np.shape(array) for array in both]
        if any(len(s) != 4 or s[0] * s[2] * s[3] != 1 for s in shapes) or len(set(shapes)) > 1:
            raise UserError(
                f"data.codec.statistics = {self.statistics!r}: mean and std have shapes {shapes}, "
                "not (1, c, 1, 1); name the latents_stats.pt of these latents"
            )
        mean, std = (np.array(array, np.float32).reshape(1, 1, 1, -1) for array in both)
        return mean, std

    def latent(self, stored: Array, key: Key) -> Latents:
        mean, std = self._statistics
        plain, mirrored = jnp.split(stored, 2, axis=-1)
        turned = jax.random.bernoulli(key, shape=(stored.shape[0], 1, 1, 1))
        return (jnp.where(turned, mirrored, plain) - mean) / std

    def weights(self) -> Params:
        return _decoder(self.decoder, va_vae.from_published)

    def decode(self, x: Latents, weights: Params = NONE) -> Images:
        if not weights:
            return pixels.false_colours(x)
        mean, std = self._statistics
        return pixels.to_uint8_rounded(va_vae.decode(weights, x * std + mean))
