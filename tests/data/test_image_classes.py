"""What becomes a class of a folder or zip of images, and what is said where there are none."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image
from sources import refuses, use

from ig_jax.data import file_tree
from ig_jax.data.sources.image_folder import ImageFolder
from ig_jax.errors import UserError

CLASSES = ("cat", "dog", "eel")


def png(level):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def plant(root, *names, content=None):
    """Files with these names; images whose level is their number, or all with this content."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number) if content is None else content)
    return root


@pytest.fixture
def root(tmp_path):
    return plant(tmp_path / "data", *(f"{c}/{i}.png" for c in CLASSES for i in range(2)))


def zipped(folder):
    archive = folder.parent / "data.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        for file in sorted(folder.rglob("*")):
            writer.write(file, file.relative_to(folder).as_posix())
    return archive


def source(path, num_classes=3, **rest):
    return ImageFolder(str(path), 4, num_classes, **rest)


def is_the_data(found):
    batch = use(found)
    assert [found.name(index) for index in range(6)] == [
        f"{c}/{i}.png" for c in CLASSES for i in range(2)
    ]
    np.testing.assert_array_equal(batch["label"], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(batch["stored"][:, 0, 0, 0], range(6))


HIDDEN = [".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/cat/._0.png", "cat/._0.png"]
HIDDEN += ["dog/.thumbs/0.png", "eel/__MACOSX/1.png", ".hidden.png", "lost+found/0.png"]


@pytest.mark.parametrize("zip_it", [False, True])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_names_are_no_data(root, name, zip_it):
    plant(root, name, content=b"no image")
    is_the_data(source(zipped(root) if zip_it else root))


def test_a_hidden_folder_may_hold_the_data(root):
    root.rename(root.parent / ".cache")
    is_the_data(source(root.parent / ".cache"))


@pytest.mark.parametrize("zip_it", [False, True])
@pytest.mark.parametrize("name", ["cat/readme.pdf", "features.h5", "dog/a.mpg", "dog/a.png.txt"])
def test_other_files_are_passed_over(root, name, zip_it):
    plant(root, name, content=b"no image")
    is_the_data(source(zipped(root) if zip_it else root))


def moved(root, name, link):
    """The file or folder lies elsewhere, and a link in its place leads to it."""
    elsewhere = root.parent / "elsewhere" / name
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    (root / name).rename(elsewhere)
    (root / name).symlink_to(link(elsewhere, (root / name).parent))


LINKS = {"absolute": lambda to, at: to, "relative": lambda to, at: os.path.relpath(to, at)}


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("names", [["cat"], ["eel/1.png"], list(CLASSES)])
def test_links_to_folders_and_files_are_followed(root, names, link):
    for name in names:
        moved(root, name, link)
    is_the_data(source(root))


@pytest.mark.parametrize("to", [".", "..", "../..", "/", "../cat", "../eel"])
def test_a_link_to_a_folder_that_it_lies_in_adds_nothing(root, to):
    place = {"../cat": "cat", "../eel": "eel"}.get(to, "dog")
    (root / place / "loop").symlink_to(to)
    is_the_data(source(root))


def test_links_in_a_circle_end(root):
    for name in ("a", "b"):
        (root.parent / name).mkdir()
    (root.parent / "a" / "x").symlink_to(root.parent / "b")
    (root.parent / "b" / "y").symlink_to(root.parent / "a")
    (root / "cat" / "others").symlink_to(root.parent / "a")
    is_the_data(source(root))


def test_links_that_multiply_are_refused_before_they_do(tmp_path):
    """Eight folders with links to one another: 8! ways through them."""
    names = "abcdefgh"
    plant(tmp_path, *(f"{name}/0.png" for name in names))
    for name in names:
        for other in set(names) - {name}:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    refuses(source(tmp_path, 8), f"reached in more than {file_tree.MOST_WAYS} ways")


@pytest.mark.parametrize("name", ["ant", "cat/2.png", "cat/more"])
def test_a_link_to_nothing_is_named(root, name):
    (root / name).symlink_to("missing")
    refuses(source(root), f"{root}/{name}: is a link to nothing")


def test_a_link_to_itself_is_named(root):
    (root / "cat" / "x").symlink_to("x")
    refuses(source(root), f"{root}/cat/x: is a link to nothing")


def test_folders_are_listed_however_deep_they_lie(root):
    deep = root / "eel" / "/".join("d" * 400)
    deep.mkdir(parents=True)
    (root / "eel" / "1.png").rename(deep / "1.png")
    np.testing.assert_array_equal(use(source(root))["label"], [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("zip_it", [False, True])
@pytest.mark.parametrize("name", ["ant/", "dog2/deep/", "bee/readme.txt"])
def test_a_class_without_pictures_is_named(root, name, zip_it):
    plant(root, f"{name}x", content=b"")
    if name.endswith("/"):
        (root / name / "x").unlink()
    path = zipped(root) if zip_it else root
    first = name.split("/")[0]
    refuses(source(path, 4), f"{path}: {first} is without images", "remove folders that are none")


def test_more_and_fewer_classes_than_asked_for_are_refused_with_both_numbers(root):
    found = f"{root}: holds 3 folders of images, each a class, but num_classes = "
    refuses(source(root, 2), f"{found}2; set num_classes = 3, or write")
    refuses(source(root, 10), f"{found}10; set num_classes = 3, or allow it with fewer_classes")
    refuses(source(root, 1), f"{found}1; ", '{"labels": null} to dataset.json to train without')
    refuses(source(root, 2, fewer_classes=True), "num_classes = 2")
    is_the_data(source(root, 10, fewer_classes=True))


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "test"), ("train",)])
def test_a_path_one_level_too_high_is_told(root, names):
    for name in names:
        (root.parent / "all" / name).mkdir(parents=True)
        plant(root.parent / "all" / name, *(f"{c}/0.png" for c in CLASSES))
    place = root.parent / "all" / sorted(names)[0]
    refuses(source(root.parent / "all", 10), f"name one of them in path ({place}), or set")


def test_a_line_tells_what_was_found(root):
    assert source(root).summary() == f"6 images, 3 classes, 'cat' to 'eel', in {root}"
    entries = [[f"{c}/{i}.png", 7 * i] for c in CLASSES for i in range(2)]
    (root / "dataset.json").write_text(json.dumps({"labels": entries}))
    assert source(root, 10).summary() == f"6 images, 2 classes of dataset.json, in {root}"
    assert source(root).unlabelled().summary() == f"6 images, no classes, in {root}"


UNLABELLED = {
    "flat": (["b.png", "a.png"], None),
    "flat with an empty folder": (["b.png", "a.png", "empty/x.txt"], None),
    "labels of null": (["00000/a.png", "00001/b.png"], {"labels": None}),
    "no labels": (["00000/a.png", "b.png"], {}),
}


@pytest.mark.parametrize("zip_it", [False, True])
@pytest.mark.parametrize("names, content", UNLABELLED.values(), ids=UNLABELLED)
def test_pictures_without_classes_are_of_class_0_where_there_is_one(
    tmp_path, names, content, zip_it
):
    folder = plant(tmp_path / "data", *names)
    if content is not None:
        (folder / "dataset.json").write_text(json.dumps(content))
    path = zipped(folder) if zip_it else folder
    found = source(path, 1)
    np.testing.assert_array_equal(use(found)["label"], [0, 0])
    assert found.summary() == f"2 images, no classes, in {path}"
    refuses(source(path, 10), f"{path}", "but num_classes = 10; set num_classes = 1 to train")
    refuses(source(path, 10, fewer_classes=True), "set num_classes = 1")


def test_one_folder_is_one_class(tmp_path):
    plant(tmp_path, "all/a.png", "all/deep/b.png")
    np.testing.assert_array_equal(use(source(tmp_path, 1))["label"], [0, 0])
    assert source(tmp_path, 1).summary() == f"2 images, 1 class, 'all', in {tmp_path}"
    refuses(source(tmp_path), f"{tmp_path}: holds the folder all, each a class")


@pytest.mark.parametrize("num_classes", [1, 3])
def test_some_pictures_in_folders_and_some_in_none_are_refused(root, num_classes):
    plant(root, "a.png")
    refuses(source(root, num_classes), f"{root}: a.png is in no folder, so of no class, but others")


@pytest.mark.parametrize("content", [None, {"labels": None}, {"labels": [["a.png", 3]]}])
def test_classes_can_be_left_aside(root, content):
    plant(root, "a.png")
    if content is not None:
        (root / "dataset.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(use(source(root).unlabelled())["label"], np.zeros(7))


@pytest.mark.parametrize("name", ["cat/2.png", "dataset.json"])
def test_special_files_are_refused(root, name):
    os.mkfifo(root / name)
    refuses(source(root), f"{root}/{name}: is a named pipe")
    (root / name).unlink()
    (root / name).symlink_to("/dev/zero")
    refuses(source(root), f"{root}/{name}: is a device")


def test_a_file_of_too_many_bytes_is_refused(root):
    with open(root / "cat" / "0.png", "ab") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(UserError, match="cat/0.png: has 1,099,511,627,776 bytes, but such a file"):
        use(source(root))


def test_a_folder_that_may_not_be_listed_is_named(root, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    refuses(source(root), f"{root}/: cannot be listed (Permission denied)")


def test_links_in_a_zip_are_refused(root):
    """Of a folder as of a file: what they lead to is not in there."""
    link = zipfile.ZipInfo("ant")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(zipped(root), "a") as archive:
        archive.writestr(link, "../elsewhere/ant")
    refuses(source(root.parent / "data.zip"), "data.zip: ant is only a link; zip what it leads to")
