"""From an image of any kind to a square of 8-bit RGB: the crop that published latents are made of.

Known as `center_crop_arr` (ADM, DiT, SiT) and `center-crop-dhariwal` (EDM2, REPA). It stays with
Pillow on the host because Pillow rounds to 8 bits after each of its two passes, and the latents
that people compare were made from pixels rounded so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ig_jax.errors import BadExample
from ig_jax.io import images

CROP_NAME = "center-crop-dhariwal"  # in records of what made latents
LARGEST_SIDE = 2**16  # side of a cropped image

# Of a source of images. Pillow leaves the interpreter to others while it decodes and scales, and
# a few threads more than cores hide the latency of a disk or network.
_THREADS = max(8, os.cpu_count() or 1)


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The largest square in the centre, scaled to `size`; smaller images are scaled up.

    Halved with a box filter while both sides have at least twice the size, then scaled with a
    bicubic filter until the shorter side has the size, then cut; an odd remainder leaves one pixel
    more on the right and at the bottom.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def decode(content: bytes, size: int, name: str) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The crop of an encoded image (JPEG, PNG, ...).

    Raises:
      BadExample: it cannot be decoded, or is so thin that scaling it would take too much memory;
        calls the image `name`.
    """
    image = images.decode(content, name)
    short, long = sorted(image.size)
    if size * size * long / short > images.MOST_PIXELS:
        raise BadExample(
            f"{name}: has {image.width} x {image.height} pixels, too thin to be scaled to "
            f"{size} on the shorter side; crop it or remove it"
        )
    return center_crop(image, size)


class Cropped:
    """Base of sources of cropped images: uint8 [size, size, 3], decoded in threads."""

    size: int  # side of the cropped images
    num_classes: int

    stored_dtype = np.uint8

    def __post_init__(self):
        for name in ("size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @cached_property
    def _decoders(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS)

    def _stacked(
        self, image: Callable[..., np.ndarray], *arguments: Sequence[Any]
    ) -> UInt8[np.ndarray, "n {self.size} {self.size} 3"]:
        """`image` of each row of the arguments."""
        stored = np.empty((len(arguments[0]), *self.stored_shape), self.stored_dtype)
        for row, found in enumerate(self._decoders.map(image, *arguments)):
            stored[row] = found
        return stored
