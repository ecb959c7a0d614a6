"""Images of the kinds that people have become 8-bit RGB; all else is refused by name."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ig_jax.data import crop
from ig_jax.errors import BadExample, UserError
from ig_jax.io import images

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = np.stack([RAMP] * 3, axis=-1)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content):
    return np.asarray(images.decode(content, "a.png"))


def refused(content, *words, error=BadExample):
    with pytest.raises(error) as caught:
        decoded(content)
    message = str(caught.value)
    assert message.startswith("a.png: ") and "\n" not in message
    for word in words:
        assert word in message


LOSSLESS = [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})]


@pytest.mark.parametrize("kind, options", LOSSLESS)
def test_every_lossless_format_gives_its_pixels(kind, options):
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    content = encoded(Image.fromarray(colours), kind, **options)
    np.testing.assert_array_equal(decoded(content), colours)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])  # the latter is what some cameras call .jpg
def test_jpeg_is_read(kind):
    assert np.abs(decoded(encoded(Image.fromarray(GREY), kind)).astype(int) - GREY).max() <= 8


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    for kind in ("GIF", "PNG", "TIFF"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.all(decoded(content) == 10), kind


def tiff(bits, values, byteorder="<", photometric=1):
    """Uncompressed grey of so many bits, one strip."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 16}
    tags[279] = len(values)
    entries = b"".join(struct.pack(f"{byteorder}HHII", t, 4, 1, v) for t, v in tags.items())
    start = 8 + len(values)
    head = {"<": b"II*\0", ">": b"MM\0*"}[byteorder] + struct.pack(f"{byteorder}I", start)
    count = struct.pack(f"{byteorder}H", len(tags))
    return head + values + count + entries + bytes(4)


def test_grey_of_16_bits_is_scaled():
    """White is 65535: a level of 8 bits times 257."""
    wide = RAMP.astype(np.uint16) * 257
    for content in (
        encoded(Image.fromarray(wide)),
        encoded(Image.fromarray(wide), "TIFF"),
        encoded(Image.fromarray(wide), "TIFF", compression="tiff_lzw"),
        tiff(16, wide.astype("<u2").tobytes()),
        tiff(16, wide.astype(">u2").tobytes(), ">"),
        tiff(16, (65535 - wide).astype("<u2").tobytes(), photometric=0),
    ):
        np.testing.assert_array_equal(decoded(content), GREY)


def test_levels_between_those_of_8_bits_are_rounded():
    levels = np.array([[0, 128, 129, 65535 - 129, 65535 - 128, 65535]], np.uint16)
    found = decoded(encoded(Image.fromarray(levels)))[0, :, 0]
    np.testing.assert_array_equal(found, [0, 0, 1, 254, 255, 255])


def test_grey_of_12_bits_is_scaled():
    levels = np.linspace(0, 4095, 256).round().astype(int).reshape(-1, 2)
    packed = np.stack(
        [levels[:, 0] >> 4, (levels[:, 0] & 15) << 4 | levels[:, 1] >> 8, levels[:, 1] & 255], 1
    )
    np.testing.assert_array_equal(decoded(tiff(12, packed.astype(np.uint8).tobytes())), GREY)


@pytest.mark.parametrize("dtype, words", [(np.float32, "float32"), (np.int32, "int32")])
def test_values_without_a_white_are_refused(dtype, words):
    content = encoded(Image.fromarray(RAMP.astype(dtype)), "TIFF")
    refused(content, f"holds {words}", "convert it to 8 or 16 bits")


COLOUR = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [255, 0, 0]]], np.uint8)
ALPHA = np.array([[0, 77], [255, 9]], np.uint8)


@pytest.mark.parametrize(
    "image, options",
    [
        (Image.fromarray(COLOUR).quantize(4), {}),
        (Image.fromarray(COLOUR).quantize(4), {"transparency": 0}),
        (Image.fromarray(COLOUR).quantize(4), {"transparency": bytes([0, 128, 255, 7])}),
        (Image.fromarray(np.dstack([COLOUR, ALPHA])), {}),
    ],
    ids=["palette", "transparent colour", "translucent palette", "translucent"],
)
def test_transparency_is_dropped(image, options):
    np.testing.assert_array_equal(decoded(encoded(image, **options)), COLOUR)


def test_grey_with_transparency_and_one_bit_are_read():
    translucent = Image.merge("LA", [Image.fromarray(ALPHA)] * 2)
    np.testing.assert_array_equal(decoded(encoded(translucent)), np.stack([ALPHA] * 3, -1))
    np.testing.assert_array_equal(decoded(encoded(Image.new("1", (2, 2), 1))), 255)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n%%EOF\n"
OTHERS = {
    "eps": EPS,
    "pdf": b"%PDF-1.4\n%%EOF\n",
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "mpeg": b"\x00\x00\x01\xb3" + bytes(100),
    "ppm": b"P6 1 1 255 abc",
    "web page": b"<html>not found</html>",
    "empty": b"",
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_other_kinds_are_refused_whatever_their_name(content):
    refused(content, "cannot be decoded (it is none of PNG, JPEG, WEBP, BMP, TIFF, GIF)")


def test_no_program_is_started_for_an_eps(tmp_path, monkeypatch):
    trace = tmp_path / "started"
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {trace}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    refused(EPS)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["a.png", "a.JPG", "b/a.jpe", "a.jfif", "a.WebP", "a.tif", "a.b.gif"]
)
def test_a_name_tells_an_image(name):
    assert images.is_image(name)


@pytest.mark.parametrize("name", ["a.pdf", "a.h5", "a.mpg", "png", "a.png/", "a.png.txt", ".png"])
def test_other_names_tell_none(name):
    assert not images.is_image(name)


def blank_png(width, height):
    """What declares so many black pixels, and is as small as it can be."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = b"\0" * (height * (1 + -(-width // 8))) if width * height < 10**7 else b""
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


@pytest.mark.parametrize("size", [(1, 10**8), (10**8, 1), (9460, 9460), (30_000, 30_000)])
def test_a_small_file_of_too_many_pixels_is_refused_before_it_is_decoded(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", None)  # would be called
    refused(blank_png(*size))


def test_the_bound_holds_where_pillow_has_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    refused(blank_png(9460, 9460), "has 9460 x 9460 pixels, but at most 89,478,485 are decoded")


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_thin_image_is_not_scaled_to_gigabytes(size):
    content = blank_png(*size)
    assert crop.decode(content, 16, "a.png").shape == (16, 16, 3)
    with pytest.raises(BadExample, match="^a.png: has .* pixels, too thin to be scaled to 256"):
        crop.decode(content, 256, "a.png")


def test_the_size_of_a_file_is_read_without_decoding_it(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(blank_png(7, 5))
    monkeypatch.setattr(Image.Image, "load", None)
    assert images.size_of(tmp_path / "a.png") == (7, 5)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as sparse:
        sparse.write(blank_png(7, 5))
        sparse.truncate(2**40)
    with pytest.raises(UserError, match="a.png: has 1,099,511,627,776 bytes, but such a file has"):
        images.read(tmp_path / "a.png")


def test_special_files_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    for name, kind in (("a.png", "a named pipe"), ("b.png", "a device")):
        for use in (images.read, images.size_of):
            with pytest.raises(UserError, match=f"{name}: is {kind}"):
                use(tmp_path / name)
