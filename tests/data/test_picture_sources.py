"""Images are cropped as the published latents' images were, and a bad one is named.

The crop is checked against its sizes and places in plain arithmetic, and against Pillow's own
filters on images for which a mistake in any step shows.
"""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sources import refuses, use
from tfds_pictures import (
    CLASSES,
    FILES,
    IMAGENET,
    LABEL,
    LABELS,
    SHARD,
    SIZE,
    contents,
    encoded,
    expected_pictures,
    noise,
    tfds_source,
    write_tfds,
)

from ig_jax.data import crop
from ig_jax.data.crop import center_crop
from ig_jax.data.sources.image_folder import ImageFolder
from ig_jax.data.sources.tfds_images import TfdsImages
from ig_jax.errors import BadExample, UserError
from ig_jax.types import Source


def halved(pixels):
    """The box filter: a mean over 2 x 2 pixels, each pass rounded half up to 8 bits."""
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    wide = pixels[: 2 * height, : 2 * width].astype(int)
    rows = (wide[:, 0::2] + wide[:, 1::2] + 1) // 2
    return ((rows[0::2] + rows[1::2] + 1) // 2).astype(np.uint8)


def stated(pixels, size):
    """The crop in numpy, for even sides while halving; Pillow is asked for the bicubic only."""
    while min(pixels.shape[:2]) >= 2 * size:
        pixels = halved(pixels)
    height, width = pixels.shape[:2]
    scaled = (
        round(width * (size / min(width, height))),
        round(height * (size / min(width, height))),
    )
    pixels = np.asarray(Image.fromarray(pixels).resize(scaled, Image.Resampling.BICUBIC))
    top, left = (scaled[1] - size) // 2, (scaled[0] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "width, height, size",
    [
        (8, 8, 8),
        (16, 16, 8),  # halved to the size: no scaling is left
        (15, 15, 8),  # one less: not halved
        (64, 48, 8),  # halved twice
        (96, 40, 8),  # wide, halved twice, to 24 x 10
        (11, 9, 8),
        (9, 31, 8),  # tall
        (20, 13, 7),
        (5, 3, 8),  # scaled up
        (1, 1, 4),
        (33, 20, 16),  # 33 * 16 / 20 = 26.4
        (25, 16, 16),  # an odd remainder
    ],
)
def test_the_crop_is_halving_then_bicubic_then_the_centre(width, height, size):
    pixels = noise(width, height)
    found = center_crop(Image.fromarray(pixels), size)
    assert found.dtype == np.uint8 and found.shape == (size, size, 3)
    np.testing.assert_array_equal(found, stated(pixels, size))


def test_an_odd_side_is_halved_downwards():
    pixels = noise(21, 20)
    half = np.asarray(Image.fromarray(pixels).resize((10, 10), Image.Resampling.BOX))
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 10), half)


def test_a_side_of_a_half_is_rounded_to_even():
    pixels = noise(10, 4)  # 7.5 becomes 8
    scaled = np.asarray(Image.fromarray(pixels).resize((8, 3), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 3), scaled[:, 2:5])
    pixels = noise(3, 2)  # 4.5 becomes 4
    scaled = np.asarray(Image.fromarray(pixels).resize((4, 3), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 3), scaled[:, :3])


@pytest.mark.parametrize("width, height", [(7, 7), (3, 5), (40, 9), (200, 100)])
def test_a_constant_picture_stays_constant(width, height):
    found = center_crop(Image.new("RGB", (width, height), (250, 3, 128)), 8)
    np.testing.assert_array_equal(found, np.broadcast_to([250, 3, 128], (8, 8, 3)))


@pytest.mark.parametrize("width, height, left, top", [(8, 11, 0, 1), (12, 8, 2, 0), (8, 15, 0, 3)])
def test_a_side_that_is_right_is_cut_and_not_filtered(width, height, left, top):
    pixels = noise(width, height)
    found = center_crop(Image.fromarray(pixels), 8)
    np.testing.assert_array_equal(found, pixels[top : top + 8, left : left + 8])


def test_halving_is_a_mean_over_two_by_two_pixels():
    """Which a bicubic filter to the same size is not."""
    pixels = noise(16, 16)
    blocks = pixels.reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(center_crop(Image.fromarray(pixels), 8) - blocks).max() <= 1


GREY = np.array([[0, 77], [255, 9]], np.uint8)
COLOUR = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 255, 0], [255, 0, 0]]], np.uint8)


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(GREY), np.stack([GREY] * 3, axis=-1)),
        (Image.fromarray(COLOUR).quantize(4), COLOUR),
        (Image.fromarray(np.dstack([COLOUR, GREY])), COLOUR),  # transparency has no colour
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), np.full((2, 2, 3), [255, 0, 0])),
        (Image.new("1", (2, 2), 1), np.full((2, 2, 3), 255)),
    ],
    ids=["grey", "palette", "transparent", "CMYK", "black and white"],
)
def test_a_picture_of_any_mode_becomes_rgb(image, expected):
    np.testing.assert_array_equal(center_crop(image, 2), expected)


def plant(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def pictures(tmp_path):
    return plant(tmp_path / "train", {**contents(), "n02/readme.txt": b"hello", "list.csv": b"x"})


def zipped(folder):
    archive = folder.parent / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        for file in sorted(folder.rglob("*"), reverse=True):
            if file.is_file():
                writer.write(file, file.relative_to(folder).as_posix())
    return archive


def folder_source(path, size=SIZE, num_classes=3):
    return ImageFolder(str(path), size, num_classes)


def gives_the_pictures(source):
    assert isinstance(source, Source)
    assert len(source) == 5 and source.held_out() is None
    batch = use(source)
    assert batch["stored"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["stored"], expected_pictures())
    np.testing.assert_array_equal(batch["label"], LABELS)
    assert [source.name(index) for index in range(5)] == FILES


def test_a_folder_gives_cropped_pictures_and_the_number_of_their_folder(pictures):
    gives_the_pictures(folder_source(pictures))


def test_shape_and_dtype_are_known_before_anything_is_read(tmp_path):
    source = folder_source(tmp_path / "absent")
    assert (source.stored_shape, source.stored_dtype) == ((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="absent: is neither a folder nor a .zip"):
        len(source)


def test_a_folder_called_images_and_zips_are_the_same_data(pictures):
    pictures.rename(pictures.parent / "images")
    above = pictures.parent
    for place in (above, above / "images", zipped(above / "images")):
        batch = use(folder_source(place))
        np.testing.assert_array_equal(batch["stored"], expected_pictures())
        np.testing.assert_array_equal(batch["label"], LABELS)


@pytest.mark.parametrize("indices", [[3, 0, 3, 1], [4], []])
def test_any_batch_is_its_pictures_one_by_one(pictures, indices):
    source, whole = folder_source(pictures), use(folder_source(pictures))
    batch = source.batch(np.array(indices, int))
    np.testing.assert_array_equal(batch["stored"], whole["stored"][indices])
    np.testing.assert_array_equal(batch["label"], whole["label"][indices])


def test_threads_may_read_at_once(pictures):
    source, whole = folder_source(pictures), use(folder_source(pictures))
    orders = [np.random.default_rng(seed).permutation(5) for seed in range(16)]
    with ThreadPoolExecutor(4) as readers:
        for order, batch in zip(orders, readers.map(source.batch, orders), strict=True):
            np.testing.assert_array_equal(batch["stored"], whole["stored"][order])


@pytest.mark.parametrize("zip_it", [False, True])
def test_a_file_of_labels_decides_over_folders(pictures, zip_it):
    entries = [[name, 4 - index] for index, name in enumerate(FILES)]
    (pictures / "dataset.json").write_text(json.dumps({"labels": entries[::-1]}))
    source = folder_source(zipped(pictures) if zip_it else pictures, num_classes=CLASSES)
    np.testing.assert_array_equal(use(source)["label"], [4, 3, 2, 1, 0])


def test_a_file_of_labels_allows_pictures_in_no_folder(tmp_path):
    plant(tmp_path, {"img1.png": encoded(0), "img0.png": encoded(1)})
    labels = {"labels": [["img1.png", 1], ["img0.png", 3]]}
    (tmp_path / "dataset.json").write_text(json.dumps(labels))
    labels = use(folder_source(tmp_path, num_classes=CLASSES))["label"]
    np.testing.assert_array_equal(labels, [3, 1])


@pytest.mark.parametrize(
    "content, words",
    [
        ({"labels": None}, "gives no labels, but num_classes = 5; set num_classes = 1"),
        ({"labels": {}}, 'must hold {"labels": [[file, class], ...]}, or {"labels": null}'),
        ([[name, 0] for name in FILES], "must hold"),
        ({"labels": [[name, True] for name in FILES]}, "entry ['n02/b.png', True] must be"),
        ({"labels": [[name, None] for name in FILES]}, "entry ['n02/b.png', None] must be"),
        ({"labels": [[name, 0] for name in FILES[1:]]}, f"{FILES[0]} is not in it"),
        ({"labels": [[name, 0] for name in [*FILES, "n3/m.png"]]}, "n3/m.png is in it but not"),
        ({"labels": [[name, 5] for name in FILES]}, "label 5 of n02/b.png must lie in 0..4"),
    ],
)
def test_a_file_of_labels_that_does_not_fit_is_refused(pictures, content, words):
    (pictures / "dataset.json").write_text(json.dumps(content))
    refuses(folder_source(pictures, num_classes=CLASSES), "train/dataset.json: ", words)


@pytest.mark.parametrize(
    "settings, words", [(("", 8, 2), "path = ''"), (("a", 0, 2), "size = 0"), (("a", 8, 0), "num_")]
)
def test_settings_that_no_data_set_has_are_refused(settings, words):
    with pytest.raises(ValueError, match=f"^{words}.*must "):
        ImageFolder(*settings)


def test_a_place_without_pictures_is_refused(tmp_path):
    plant(tmp_path, {"a/readme.txt": b"hello"})
    refuses(folder_source(tmp_path), f"{tmp_path}: holds no images")


def test_pictures_in_no_folder_are_named_and_counted(pictures):
    plant(pictures, {f"{number}.png": b"" for number in range(5)})
    refuses(folder_source(pictures), "0.png, 1.png, 2.png and 2 others are in no folder")


DAMAGE = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "a web page": lambda data: b"<html>not found</html>",
    "corrupt": lambda data: data[:60] + bytes(40) + data[100:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("zip_it", [False, True])
def test_a_picture_that_cannot_be_decoded_is_a_bad_example(pictures, damage, zip_it):
    file = pictures / FILES[1]
    file.write_bytes(damage(file.read_bytes()))
    source = folder_source(zipped(pictures) if zip_it else pictures)
    refuses(source, f"/{FILES[1]}: cannot be decoded (", error=BadExample)
    with pytest.raises(BadExample) as caught:
        source.batch(np.array([1]))
    assert "0x" not in str(caught.value)  # no addresses: the sentence is the same every time
    source.batch(np.array([0, 2, 3, 4]))


def test_a_picture_too_large_to_unpack_is_a_bad_example(pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # twice as many are an error
    refuses(folder_source(pictures), "cannot be decoded (", "decompression bomb", error=BadExample)


def test_a_picture_that_vanishes_is_named(pictures):
    source = folder_source(pictures)
    assert len(source) == 5
    (pictures / FILES[3]).unlink()
    refuses(source, FILES[3], "cannot be read (No such file or directory)")


def test_a_mistake_of_ours_is_not_taken_for_a_bad_picture(monkeypatch):
    def broken(image, size):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(crop, "center_crop", broken)
    with pytest.raises(ZeroDivisionError):
        crop.decode(encoded(0), SIZE, "a.png")


def test_a_data_set_of_tfds_gives_cropped_pictures_and_labels(tmp_path):
    gives_the_pictures(tfds_source(write_tfds(tmp_path)))


def test_tfds_reads_the_same_pictures(tmp_path):
    builder = tfds.builder_from_directory(write_tfds(tmp_path))
    raw = {"image": tfds.decode.SkipDecoding()}  # it may decode them with another library
    read = list(builder.as_data_source("validation", decoders=raw))
    cropped = [crop.decode(example["image"], SIZE, "") for example in read]
    batch = use(tfds_source(tmp_path))
    np.testing.assert_array_equal(batch["stored"], np.stack(cropped))
    np.testing.assert_array_equal(batch["label"], [example["label"] for example in read])


@pytest.mark.parametrize("indices", [[3, 0, 3, 1], [4], []])
def test_any_batch_of_tfds_is_its_pictures_one_by_one(tmp_path, indices):
    source, whole = tfds_source(write_tfds(tmp_path)), use(tfds_source(tmp_path))
    batch = source.batch(np.array(indices, int))
    np.testing.assert_array_equal(batch["stored"], whole["stored"][indices])
    np.testing.assert_array_equal(batch["label"], whole["label"][indices])


def test_threads_may_read_tfds_at_once(tmp_path):
    source, whole = tfds_source(write_tfds(tmp_path)), use(tfds_source(tmp_path))
    orders = [np.random.default_rng(seed).permutation(5) for seed in range(16)]
    with ThreadPoolExecutor(4) as readers:
        for order, batch in zip(orders, readers.map(source.batch, orders), strict=True):
            np.testing.assert_array_equal(batch["stored"], whole["stored"][order])


def test_a_picture_without_a_file_name_is_called_by_its_shard_and_record(tmp_path):
    features = {name: IMAGENET[name] for name in ("image", "label")}
    source = tfds_source(write_tfds(tmp_path, features=features), "validation[1:]")
    assert source.name(2) == f"{SHARD}:3"
    np.testing.assert_array_equal(use(source)["stored"], expected_pictures()[1:])


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_picture_of_tfds_that_cannot_be_decoded_is_a_bad_example(tmp_path, damage):
    images = list(contents().values())
    images[2] = damage(images[2])
    source = tfds_source(write_tfds(tmp_path, images))
    words = f"{SHARD}: record 2 ({FILES[2]}): cannot be decoded ("
    refuses(source, words, error=BadExample)
    source.batch(np.array([0, 1, 3, 4]))


@pytest.mark.parametrize("label", [-1, CLASSES])  # ImageNet's test split has -1
def test_a_label_of_tfds_outside_of_the_classes_is_named(tmp_path, label):
    source = tfds_source(write_tfds(tmp_path, labels=[0, 1, label, 0, 0]))
    refuses(source, f"{SHARD}: record 2: label {label} must lie in 0..4")


def test_an_unknown_split_of_pictures_is_refused_when_it_is_used(tmp_path):
    source = tfds_source(write_tfds(tmp_path), "train")
    assert (source.stored_shape, source.stored_dtype) == ((8, 8, 3), np.uint8)
    refuses(source, "has no split 'train'; name one of validation")


@pytest.mark.parametrize(
    "features",
    [
        {"label": LABEL},
        {"image": tfds.features.Image()},
        {"image": tfds.features.Image(shape=(None, None, 1), dtype=np.float32), "label": LABEL},
        {"image": tfds.features.Text(), "label": LABEL},
    ],
)
def test_features_that_are_no_pictures_are_refused(tmp_path, features):
    tfds.features.FeaturesDict(features).save_config(write_tfds(tmp_path))
    refuses(tfds_source(tmp_path), f"{tmp_path}/features.json: images need image of uint8")


@pytest.mark.parametrize(
    "settings, words",
    [
        (("", "train", 8, 2), "path = ''"),
        (("a", "", 8, 2), "split = ''"),
        (("a", "train", 0, 2), "size = 0"),
        (("a", "train", 8, 0), "num_classes = 0"),
    ],
)
def test_settings_that_no_data_set_of_tfds_has_are_refused(settings, words):
    with pytest.raises(ValueError, match=f"^{words}.*must "):
        TfdsImages(*settings)
