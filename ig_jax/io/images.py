"""Encoded images to 8-bit RGB: the only place that decodes them.

Pillow goes by the content of a file, whatever its name, and knows dozens of formats: for EPS it
starts Ghostscript. Here it tries six, in process, and a size is checked before anything is decoded.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ig_jax.errors import BadExample, UserError, shown
from ig_jax.io import files

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # of an animation, the first frame
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
)
LARGEST = 2**30  # bytes of a file; `MOST_PIXELS` take less, however they are encoded
MOST_PIXELS = 89_478_485  # a quarter of a GiB in RGB; Pillow's own bound, from which on it warns
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF

# Pillow warns of odd metadata, which is not read here, and of sizes, which are refused here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def is_image(name: str) -> bool:
    """Returns whether a file is meant as an image, by the end of its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def decode(content: bytes, name: str) -> Image.Image:
    """An encoded image as RGB, 8 bits a channel; transparency is dropped.

    Grey of more bits is scaled to 8, black to black and white to white.

    Args:
      name: what to call the image in messages.

    Raises:
      BadExample: it is of no known format, damaged or too large, or its values have no white, as
        float32 and int32.
    """
    with _opened(io.BytesIO(content), name) as image:
        return _rgb(image, name)


def read(path: Path) -> Image.Image:
    """The image in a file, as `decode` gives it.

    Raises:
      UserError: as `files.read_bytes`.
      BadExample: as `decode`.
    """
    return decode(files.read_bytes(path, LARGEST), str(path))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of the image in a file, which is not decoded.

    Raises:
      UserError: as `files.open_regular`.
      BadExample: as `decode`, as far as the start of the file tells.
    """
    with files.open_regular(path) as file, _opened(file, str(path)) as image:
        return image.size


@contextmanager
def _opened(stream: io.IOBase, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadExample(
                    f"{name}: has {image.width} x {image.height} pixels, but at most "
                    f"{MOST_PIXELS:,} are decoded; scale it down or remove it"
                )
            yield image
    except UserError:
        raise
    # Pillow's decoders raise whatever their parsing runs into (OSError, SyntaxError, ValueError,
    # struct.error, DecompressionBombError, ...), and all of it means the same.
    except Exception as error:
        raise BadExample(
            f"{name}: cannot be decoded ({_reason(error)}); replace the image or remove it"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # whose own text is the address of a buffer
        return f"it is none of {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_in_8_bits(image)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = {"I": "int32", "F": "float32"}[image.mode]
        raise BadExample(
            f"{name}: holds {kind} (Pillow's mode {shown(image.mode)}), which does not say what is "
            "white; convert it to 8 or 16 bits"
        )
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # else Pillow warns; the colours are the same
    return image.convert("RGB")


def _in_8_bits(image: Image.Image) -> np.ndarray:
    """uint8 [h, w] of grey that Pillow holds in 16 bits, of which a TIFF may use 12."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** max(tags.get(BITS_PER_SAMPLE, (16,))) - 1
    values = np.asarray(image).astype(np.uint32)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    return ((values * 255 + white // 2) // white).astype(np.uint8)
