"""PNG files, grids of images, and labelled panels side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ig_jax.io import files
from ig_jax.io import images as image_files

BACKGROUND = 24  # grey level between images
_TEXT = 235


def to_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 [n, h, w, 1 or 3] -> uint8 [n, h, w, 3].

    Raises:
      ValueError: another number of channels; such latents need a codec that decodes to images.
    """
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images have {images.shape[-1]} channels: an image needs 1 or 3; "
            "choose a data.codec that decodes to images"
        )
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def save(path: Path, image: np.ndarray) -> None:
    """Writes uint8 [h, w, 1 or 3] as PNG; the file is whole or absent."""
    pil_image = Image.fromarray(np.ascontiguousarray(to_rgb(image[None])[0]))
    with files.replaced(path) as temporary:
        pil_image.save(temporary, format="PNG")


def load(path: Path, channels: int) -> np.ndarray:
    """An image file of any kind, as uint8 [h, w, channels]; of 1 channel where it is grey.

    Raises:
      UserError: it is no regular file, or cannot be decoded.
    """
    return np.asarray(image_files.read(path))[..., :channels]


def _enlarge(images: np.ndarray, least_side: int) -> np.ndarray:
    factor = max(1, -(-least_side // images.shape[1]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _caption(image: Image.Image, text: str, centre_x: float, y: int, size: int) -> None:
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(image)
    draw.text((centre_x, y), text, fill=(_TEXT,) * 3, font=font, anchor="ma")


def grid(
    images: np.ndarray, columns: int, labels: Sequence[int] | None = None, least_side: int = 32
) -> np.ndarray:
    """Images row by row with a thin border, small ones enlarged, each under its label if given.

    Args:
      images: uint8 [n, h, w, 1 or 3].
      columns: images in a row.
      labels: [n] numbers written above the images.
      least_side: images narrower than this are enlarged by a whole factor.

    Returns:
      uint8 [H, W, 3].
    """
    images = _enlarge(to_rgb(images), least_side)
    n, height, width, _ = images.shape
    head = 14 if labels is not None else 0
    step_y, step_x = height + head + 2, width + 2
    rows = -(-n // columns)
    canvas = np.full((rows * step_y + 2, columns * step_x + 2, 3), BACKGROUND, np.uint8)
    for i in range(n):
        y, x = i // columns * step_y + 2 + head, i % columns * step_x + 2
        canvas[y : y + height, x : x + width] = images[i]
    if labels is None:
        return canvas
    captioned = Image.fromarray(canvas)
    for i, label in enumerate(labels):
        centre = i % columns * step_x + 2 + width / 2
        _caption(captioned, str(label), centre, i // columns * step_y + 2, 11)
    return np.asarray(captioned)


def table(
    rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str], least_side: int = 96
) -> np.ndarray:
    """Square images under the names of their columns, beside those of their rows.

    Args:
      rows: name -> images uint8 [side, side, 1 or 3], one for each column. Every side must divide
        the largest, to which all are enlarged by whole factors.
      columns: their names.
      least_side: all are enlarged to this at least.

    Returns:
      uint8 [H, W, 3].
    """
    largest = max(len(image) for images in rows.values() for image in images)
    side = largest * max(1, -(-least_side // largest))
    left, head, step = 80, 22, side + 2
    size = (head + len(rows) * step, left + len(columns) * step, 3)
    canvas = Image.fromarray(np.full(size, BACKGROUND, np.uint8))
    for j, name in enumerate(columns):
        _caption(canvas, name, left + j * step + side / 2, 4, 13)
    for i, (name, images) in enumerate(rows.items()):
        y = head + i * step
        _caption(canvas, name, left / 2, y + side // 2 - 16, 13)
        for j, image in enumerate(images):
            tile = _enlarge(to_rgb(image[None]), side)[0]
            canvas.paste(Image.fromarray(np.ascontiguousarray(tile)), (left + j * step, y))
    return np.asarray(canvas)


def panels(named: Mapping[str, np.ndarray], gap: int = 16) -> np.ndarray:
    """Images uint8 [H, W, 3] of one height side by side, each under its name."""
    height = max(p.shape[0] for p in named.values()) + 28
    width = sum(p.shape[1] + gap for p in named.values()) + gap
    canvas = Image.fromarray(np.full((height, width, 3), BACKGROUND, np.uint8))
    x = gap
    for name, image in named.items():
        canvas.paste(Image.fromarray(image), (x, 26))
        _caption(canvas, name, x + image.shape[1] / 2, 5, 15)
        x += image.shape[1] + gap
    return np.asarray(canvas)
