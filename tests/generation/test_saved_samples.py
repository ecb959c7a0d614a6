"""Samples to judge come as people have them: any kind of image under any name, or arrays."""

import os

import numpy as np
import pytest
from PIL import Image

from ig_jax.errors import UserError
from ig_jax.generation import sample_files
from ig_jax.generation.sample_files import SavedSamples
from ig_jax.io import npz

FIELD = "evaluate.samples"


def picture(level, size=(8, 8), mode="L"):
    return Image.new(mode, size, level)


def folder_of(root, **files):
    """`name_png=picture` becomes name.png."""
    for name, image in files.items():
        image.save(root / name.replace("_", "."))
    return root


def levels(found):
    return found.read(np.arange(len(found)))[:, 0, 0, 0].tolist()


def refuses(path, *words, channels=3):
    with pytest.raises(UserError) as caught:
        SavedSamples(path, FIELD, channels)
    message = str(caught.value)
    assert message.startswith(f"{FIELD} = ") and "\n" not in message
    for word in words:
        assert word in message, message


def test_images_of_all_kinds_are_in_the_natural_order_of_their_names(tmp_path):
    names = ["img_1.png", "img_2.PNG", "img_10.bmp", "img_10b.tif", "img_011.webp", "other.gif"]
    for level, name in reversed(list(enumerate(names))):
        kind = {"webp": {"lossless": True}}.get(name.split(".")[1], {})
        picture(level).save(tmp_path / name, **kind)
    found = SavedSamples(tmp_path, FIELD)
    assert levels(found) == list(range(6))
    assert len(found) == 6 and found.shape == (8, 8, 3) and found.left_out == []


def test_equal_numbers_are_ordered_by_how_they_are_written(tmp_path):
    for level, name in enumerate(["01.png", "1.png", "001a.png", "٣.png"]):
        picture(level).save(tmp_path / name)
    assert levels(SavedSamples(tmp_path, FIELD)) == [0, 1, 2, 3]


def test_jpeg_and_png_side_by_side_are_all_judged(tmp_path):
    for i in range(4):
        picture(40 * i).save(tmp_path / f"{i:06d}.{'png' if i < 2 else 'jpg'}")
    np.testing.assert_allclose(levels(SavedSamples(tmp_path, FIELD)), [0, 40, 80, 120], atol=2)


def test_what_is_no_image_is_left_out_and_hidden_files_are_not_there(tmp_path):
    folder_of(tmp_path, a_png=picture(0))
    for name in ("list.txt", "b.pdf", ".DS_Store", "._a.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "more").mkdir()
    assert SavedSamples(tmp_path, FIELD).left_out == ["b.pdf", "list.txt", "more"]


def test_of_our_own_folder_only_samples_are_judged(tmp_path):
    target = sample_files.SampleWriter(tmp_path, 3, (8, 8, 1), ("png", "npz"))
    target.create()
    target.write(
        np.arange(3),
        np.arange(3, dtype=np.uint8)[:, None, None, None] + np.zeros((8, 8, 1), np.uint8),
    )
    target.finish(np.zeros(3, np.int64))
    (tmp_path / "settings.json").write_text("{}")
    assert {"grid.png", "samples.npz"} < {f.name for f in tmp_path.iterdir()}
    found = SavedSamples(tmp_path, FIELD)
    assert levels(found) == [0, 1, 2] and found.left_out == []
    folder_of(tmp_path, look_png=picture(9))
    assert levels(SavedSamples(tmp_path, FIELD)) == [0, 1, 2]
    assert SavedSamples(tmp_path, FIELD).left_out == ["look.png"]


def test_grey_of_16_bits_is_scaled(tmp_path):
    for i, level in enumerate((0, 100, 255)):
        Image.fromarray(np.full((8, 8), 257 * level, np.uint16)).save(tmp_path / f"{i}.png")
    assert levels(SavedSamples(tmp_path, FIELD)) == [0, 100, 255]


def cut(content):
    return content[: len(content) // 2]


DAMAGE = {"empty": lambda content: b"", "a web page": lambda content: b"<html></html>"}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("place", [0, 2])
def test_a_file_that_is_no_image_is_named_before_anything_is_judged(tmp_path, damage, place):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    file = tmp_path / f"{place}.png"
    file.write_bytes(damage(file.read_bytes()))
    refuses(tmp_path, f"{file}: cannot be decoded (it is none of PNG")
    (tmp_path / "3.png").write_bytes(b"")
    refuses(tmp_path, f"{file}: cannot be decoded (", "; 1 others are damaged, too")


def test_a_file_that_was_cut_off_is_named_when_it_is_judged(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    file = tmp_path / "2.png"
    file.write_bytes(cut(file.read_bytes()))
    with pytest.raises(UserError, match="2.png: cannot be decoded .*; replace the image or remove"):
        SavedSamples(tmp_path, FIELD).read(np.arange(4))


def test_images_of_different_sizes_are_named(tmp_path):
    folder_of(tmp_path, a_png=picture(0), b_png=picture(0), c_png=picture(0, (8, 9)))
    refuses(tmp_path, "c.png: is 8 x 9 pixels, but a.png is 8 x 8; evaluate images of one size")


def test_special_files_are_named(tmp_path):
    folder_of(tmp_path, a_png=picture(0))
    os.mkfifo(tmp_path / "b.png")
    refuses(tmp_path, "b.png: is a named pipe")


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refused)
    refuses(tmp_path, "cannot be listed (Permission denied)")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    refuses(tmp_path, "holds no images (PNG, JPEG,")


GOOD = np.zeros((4, 8, 8, 3), np.uint8)
ARRAYS = [
    (
        {"arr_0": np.moveaxis(GOOD, 3, 1)},
        "channels (1 or 3) must come last",
        "transpose(0, 2, 3, 1)",
    ),
    ({"arr_0": np.zeros((4, 1, 8, 8), np.uint8)}, "must come last", "transpose(0, 2, 3, 1)"),
    ({"arr_0": np.zeros((4, 8, 8, 4), np.uint8)}, "channels (1 or 3) must come last, [n, h, w, c]"),
    ({"arr_0": GOOD.astype(np.float32)}, "float32", "uint8 [n, h, w, c]"),
    ({"arr_0": GOOD[0]}, "of shape (8, 8, 3)"),
    ({"arr_0": GOOD[:, :0]}, "the shape (4, 0, 8, 3) has rows without elements"),
    ({"arr_0": GOOD, "arr_1": np.zeros(3, int)}, "arr_1 is int64 of shape (3,)", "each of the 4"),
    ({"arr_0": GOOD, "arr_1": np.zeros((4, 10), int)}, "arr_1 is int64 of shape (4, 10)"),
    ({"arr_0": GOOD, "arr_1": np.zeros(4)}, "arr_1 is float64 of shape (4,)"),
]


@pytest.mark.parametrize("arrays_and_words", ARRAYS)
def test_arrays_that_are_no_pictures_are_refused_with_the_way_to_make_them_so(
    tmp_path, arrays_and_words
):
    arrays, *words = arrays_and_words
    npz.write(tmp_path / "a.npz", arrays)
    refuses(tmp_path / "a.npz", *words)


def test_good_arrays_are_read(tmp_path):
    npz.write(tmp_path / "a.npz", {"arr_0": GOOD, "arr_1": np.arange(4)})
    found = SavedSamples(tmp_path / "a.npz", FIELD)
    assert (len(found), found.shape, found.left_out) == (4, (8, 8, 3), [])
    np.testing.assert_array_equal(found.labels, np.arange(4))


def test_a_remark_counts_what_is_not_judged(tmp_path):
    folder_of(tmp_path, a_png=picture(0), b_jpg=picture(1))
    for name in ("a.txt", "b.txt", "c.txt", "d.pdf"):
        (tmp_path / name).write_bytes(b"x")
    assert SavedSamples(tmp_path, FIELD).remark() == (
        f"{tmp_path}: 4 of 6 files are not evaluated: a.txt, b.txt, c.txt and 1 others"
    )
