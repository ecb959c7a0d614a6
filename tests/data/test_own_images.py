"""A folder or zip of anybody's images: classes are counted, a share of each is held out."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from ig_jax.data.sources.own_images import OwnImages
from ig_jax.errors import BadExample, UserError
from ig_jax.types import Source


def plant(root, counts: dict[str, int], size=(20, 14)):
    """Images by folder ('' for loose ones), each of a grey of its own."""
    grey = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            grey += 1
            Image.new("RGB", size, (grey, grey, grey)).save(root / folder / f"{i:03d}.png")
    return str(root)


def greys(source: OwnImages) -> list[int]:
    return source.batch(np.arange(len(source)))["stored"][:, 3, 3, 0].tolist()


def test_classes_are_counted_and_a_share_of_each_is_held_out(tmp_path):
    source = OwnImages(plant(tmp_path, {"cat": 10, "eel": 25, "yak": 4}), 8, held_out_share=0.2)
    rest = source.held_out()
    assert isinstance(source, Source) and source.num_classes == rest.num_classes == 3
    assert (len(source), len(rest), rest.held_out()) == (8 + 20 + 4, 2 + 5 + 0, None)
    # Every image is in one of the two, with the class of its folder.
    assert sorted(greys(source) + greys(rest)) == list(range(1, 40))
    for part in (source, rest):
        labels = part.batch(np.arange(len(part)))["label"]
        assert labels.tolist() == [(g > 10) + (g > 35) for g in greys(part)]
        assert [part.name(i).split("/")[0] for i in range(len(part))] == [
            ("cat", "eel", "yak")[label] for label in labels
        ]
    assert sorted(greys(rest))[:2] != [9, 10] and len(set(greys(source)[:8])) == 8
    assert "39 images, 3 classes, 'cat' to 'yak'" in source.summary()
    assert source.summary().endswith("; 32 to train on, 7 held out")


def test_which_are_held_out_is_always_the_same(tmp_path):
    path = plant(tmp_path, {"a": 30, "b": 30})
    assert greys(OwnImages(path, 8).held_out()) == greys(OwnImages(path, 8).held_out())
    assert greys(OwnImages(path, 8, held_out_share=0.0)) == list(range(1, 61))


def test_loose_images_are_of_one_class(tmp_path):
    source = OwnImages(plant(tmp_path, {"": 10}), 8)
    assert (source.num_classes, len(source), len(source.held_out())) == (1, 9, 1)
    assert source.batch(np.array([3, 0]))["label"].tolist() == [0, 0]


@pytest.mark.parametrize(("labels", "classes"), [([0, 4, 4, 2], 5), (None, 1)])
def test_dataset_json_says_the_classes(tmp_path, labels, classes):
    path = plant(tmp_path, {"": 4})
    given = labels and [[f"{i:03d}.png", label] for i, label in enumerate(labels)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": given}))
    source = OwnImages(path, 8, held_out_share=0.0)
    assert source.num_classes == classes
    assert source.batch(np.arange(4))["label"].tolist() == (labels or [0] * 4)


def test_a_zip_holds_the_same(tmp_path):
    path = plant(tmp_path / "folder", {"x": 6, "y": 5})
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in (tmp_path / "folder").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path / "folder"))
    a, b = (OwnImages(p, 8, held_out_share=0.2) for p in (path, str(tmp_path / "all.zip")))
    assert greys(a) == greys(b) and a.num_classes == b.num_classes == 2


def test_an_image_is_decoded_once(tmp_path, monkeypatch):
    source, opened = OwnImages(plant(tmp_path, {"": 8}), 8, held_out_share=0.0), []
    images = source._opened.images
    batch = type(images).batch
    monkeypatch.setattr(
        type(images), "batch", lambda self, i: opened.extend(i.tolist()) or batch(self, i)
    )
    first = source.batch(np.array([5, 2, 5]))["stored"]
    again = source.batch(np.array([2, 7, 5]))["stored"]
    assert opened == [2, 5, 7]
    np.testing.assert_array_equal(first[[1, 0]], again[[0, 2]])
    monkeypatch.setattr("ig_jax.data.sources.own_images._MOST_KEPT", 8 * 8 * 8 * 3 - 1)
    large = OwnImages(str(tmp_path), 8, held_out_share=0.0)
    opened.clear()
    for _ in range(2):
        np.testing.assert_array_equal(large.batch(np.array([5, 2, 5]))["stored"], first)
    assert opened == [5, 2, 5] * 2


def test_what_cannot_be_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="path = None: must name the folder or zip"):
        OwnImages(None, 8)
    for change in ({"size": 0}, {"split": "test"}, {"held_out_share": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} = "):
            OwnImages(**{"path": "x", "size": 8, **change})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no images"):
        _ = OwnImages(str(tmp_path / "empty"), 8).num_classes
    few = OwnImages(plant(tmp_path / "few", {"a": 3}), 8)
    assert few.held_out() is None and len(few) == 3
    with pytest.raises(UserError, match="3 images in 1 classes are too few .* raise it"):
        len(OwnImages(str(tmp_path / "few"), 8, split="held_out"))
    (tmp_path / "few" / "a" / "001.png").write_bytes(b"no image")
    with pytest.raises(BadExample, match="a/001.png"):
        few.batch(np.arange(3))
