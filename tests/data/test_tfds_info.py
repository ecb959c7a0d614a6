"""The JSON files of a TFDS folder are read here, and no code is run that they name."""

import json
import os
import sys
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sources import refuses, use
from tfds_latents import CLASSES, LABELS, MOMENTS, arrays, examples, source_of, write
from tfds_pictures import IMAGENET, expected_pictures, tfds_source, write_tfds

from ig_jax.data.sources.tfds_images import TfdsImages
from ig_jax.data.tfds import format as tfds_format
from ig_jax.data.tfds import info as tfds_info
from ig_jax.errors import BadExample

PACKAGE = "tensorflow_datasets.core.features."
FOREIGN = "tfds_payload.Feature"  # a module in the folder from which Python imports


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds") / "toy"
    return write(folder, examples(MOMENTS), tfds_format.features_of(MOMENTS, CLASSES))


@pytest.fixture
def latents(made, tmp_path):
    """The data set with descriptions of its own, which a test may change."""
    for file in made.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_text(file.read_text())
        else:
            (tmp_path / file.name).symlink_to(file)
    return tmp_path


def changed(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def payload(tmp_path, monkeypatch):
    """A module that tells when it is imported; returns whether it was."""
    place = tmp_path / "modules"
    place.mkdir()
    (place / "tfds_payload.py").write_text(
        "import pathlib; pathlib.Path(__file__ + '.ran').touch()"
    )
    monkeypatch.syspath_prepend(str(place))
    yield place / "tfds_payload.py.ran"
    sys.modules.pop("tfds_payload", None)


LABEL = {"classLabel": {"numClasses": "7"}}


def features(content):
    return content["featuresDict"]["features"]


PLANTED = {
    "of a feature": lambda c: features(c)["label"].update(pythonClassName=FOREIGN),
    "of the whole": lambda c: c.update(pythonClassName=FOREIGN),
    "of one more feature": lambda c: features(c).update(x={"pythonClassName": FOREIGN, **LABEL}),
    "in snake case": lambda c: features(c).update(x={"python_class_name": FOREIGN, **LABEL}),
    "in the words of old": lambda c: features(c).update(x={"type": FOREIGN, "content": {}}),
    "within features": lambda c: features(c).update(
        x={
            "pythonClassName": f"{PACKAGE}sequence_feature.Sequence",
            "sequence": {"feature": {"pythonClassName": FOREIGN, **LABEL}, "length": "-1"},
        }
    ),
    "under an unknown key": lambda c: c.update(more=[{"deep": {"pythonClassName": FOREIGN}}]),
    "beside a known one": lambda c: c.update(type=FOREIGN, content={}),
    "of a module of TFDS": lambda c: c.update(
        pythonClassName="tensorflow_datasets.scripts.cli.main.X"
    ),
    "that looks like one of ours": lambda c: c.update(
        pythonClassName=f"{PACKAGE}features_dict.FeaturesDict.x.Y"
    ),
}


@pytest.mark.parametrize("change", PLANTED.values(), ids=PLANTED)
def test_a_foreign_class_is_refused_by_name_and_not_imported(latents, payload, change):
    changed(latents, "features.json", change)
    refuses(source_of(latents), f"{latents}/features.json: names the class '", "known below")
    refuses(TfdsImages(str(latents), "train", 8, 7), "names the class '")
    assert not payload.exists() and "tfds_payload" not in sys.modules


def test_a_class_that_the_other_file_names_is_refused(latents, payload):
    """TFDS restores features from dataset_info.json, too."""
    changed(latents, "dataset_info.json", lambda c: c.update(features={"pythonClassName": FOREIGN}))
    refuses(source_of(latents), f"{latents}/dataset_info.json: names the class '{FOREIGN}'")
    assert not payload.exists()


def test_features_as_text_within_the_file_are_not_looked_into(latents, payload):
    text = json.dumps({"x": {"type": FOREIGN, "content": {}}})
    text = {
        "pythonClassName": f"{PACKAGE}features_dict.FeaturesDict",
        "jsonFeature": {"json": text},
    }
    changed(latents, "features.json", lambda c: features(c).update(x=text))
    np.testing.assert_array_equal(use(source_of(latents))["label"], LABELS)
    assert not payload.exists()


def test_no_file_beside_them_is_read(latents):
    """TFDS would wait for this pipe for ever: it looks there for names of the classes."""
    os.mkfifo(latents / "label.labels.txt")
    os.mkfifo(latents / "metadata.json")
    np.testing.assert_array_equal(use(source_of(latents))["label"], LABELS)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_special_files_are_refused(latents, name):
    (latents / name).unlink()
    os.mkfifo(latents / name)
    refuses(source_of(latents), f"{latents / name}: is a named pipe")


def test_words_are_read_in_either_spelling(latents):
    def snake(content):
        text = json.dumps(content)
        for camel, other in {
            "fileFormat": "file_format",
            "shardLengths": "shard_lengths",
            "filepathTemplate": "filepath_template",
            "pythonClassName": "python_class_name",
            "featuresDict": "features_dict",
            "classLabel": "class_label",
        }.items():
            text = text.replace(f'"{camel}"', f'"{other}"')
        return text

    expected = use(source_of(latents))
    for name in ("dataset_info.json", "features.json"):
        (latents / name).write_text(snake(json.loads((latents / name).read_text())))
    found = use(source_of(latents))
    np.testing.assert_array_equal(found["stored"], expected["stored"])


def test_the_words_of_tfds_before_4_5_are_read(latents):
    """Such a file stays beside data that were turned into ArrayRecord since."""
    tensor = {"shape": [8, 2, 3], "dtype": "float32", "encoding": "bytes"}
    old = {
        "moments": {"type": f"{PACKAGE}tensor_feature.Tensor", "content": tensor},
        "label": {
            "type": f"{PACKAGE}class_label_feature.ClassLabel",
            "content": {"num_classes": 7},
        },
        "file_name": {"type": f"{PACKAGE}text_feature.Text", "content": {}},
    }
    whole = {"type": f"{PACKAGE}features_dict.FeaturesDict", "content": old}
    (latents / "features.json").write_text(json.dumps(whole))
    expected = arrays(MOMENTS)["moments"].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(use(source_of(latents))["stored"], expected)


def test_every_class_that_is_read_is_one_of_tfds():
    known = tfds.features.FeatureConnector._registered_features
    assert {f"{PACKAGE}{name}" for name in tfds_info.FEATURE_CLASSES} <= set(known)


def test_what_tfds_writes_is_understood(tmp_path):
    tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "small": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=3),
            "file_name": tfds.features.Text(),
            "number": np.int64,
            "moments": tfds.features.Tensor(shape=(8, None, 2), dtype=np.float32, encoding="zlib"),
            "boxes": tfds.features.Sequence({"box": tfds.features.BBoxFeature()}),
            "inner": {"score": tfds.features.Scalar(np.float32)},
        }
    ).save_config(tmp_path)
    info = {"name": "toy", "fileFormat": "array_record", "version": "1.0.0", "splits": []}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    found = tfds_info.read(tmp_path).features
    assert found["image"] == tfds_info.Feature("Image", (None, None, 3), "uint8", "none")
    assert found["small"].shape == (8, 8, 1)
    assert found["moments"] == tfds_info.Feature("Tensor", (8, None, 2), "float32", "zlib")
    assert found["number"].dtype == "int64" and found["boxes"].kind == "Sequence"
    assert [found[name].kind for name in ("label", "file_name")] == ["ClassLabel", "Text"]


def split_of(content):
    return content["splits"][0]


DAMAGED = [
    (lambda c: split_of(c).update(shardLengths=["x"]), "holds 'x' as a length of train"),
    (lambda c: split_of(c).update(shardLengths=[True]), "holds True as a length of train"),
    (lambda c: split_of(c).update(shardLengths=[-1, 11]), "negative length"),
    (lambda c: split_of(c).update(shardLengths="4,6"), "must be a list"),
    (lambda c: split_of(c).update(shardLengths=["9" * 30]), "must be a whole number"),
    (lambda c: split_of(c).update(name=""), "has a split without a name"),
    (lambda c: c.update(splits=["train"]), "gives no name"),
    (lambda c: split_of(c).update(filepathTemplate="{SPLIT:>99999999999}"), "has the template"),
    (lambda c: split_of(c).update(filepathTemplate="{SPLIT.__class__}"), "has the template"),
    (lambda c: split_of(c).update(filepathTemplate="../{SPLIT}"), "must be a file below"),
    (lambda c: split_of(c).update(filepathTemplate="/etc/{SPLIT}"), "must be a file below"),
    (lambda c: c.update(name=3), "holds name = 3, must be a str"),
]


@pytest.mark.parametrize("change, words", DAMAGED)
def test_a_damaged_description_is_told_in_a_sentence(latents, change, words):
    changed(latents, "dataset_info.json", change)
    refuses(source_of(latents), f"{latents}/dataset_info.json: ", words)


def shaped(*dimensions):
    return lambda c: features(c)["moments"]["tensor"]["shape"].update(dimensions=list(dimensions))


SHAPES = [
    (shaped("8", "0", "3"), "as the shape of moments"),
    (shaped("8", "-2", "3"), "as the shape of moments"),
    (shaped("8", "1000000", "1000000"), "67,108,864 values at most"),
    (shaped("8", "x", "3"), "must be a whole number"),
    (lambda c: features(c).update(moments=3), "describes no data set"),
    (lambda c: features(c)["moments"]["tensor"].update(encoding=3), "holds encoding = 3"),
    (lambda c: features(c)["moments"]["tensor"].update(encoding="gzip"), "must be Tensor"),
]


@pytest.mark.parametrize("change, words", SHAPES)
def test_a_feature_that_cannot_be_is_told_in_a_sentence(latents, change, words):
    changed(latents, "features.json", change)
    refuses(source_of(latents), f"{latents}/features.json: ", words)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["[" * 10_000, '{"a": 1, "a": 2}', "3", "null", '{"name": 1}'])
def test_json_of_another_kind_is_told_in_a_sentence(latents, name, content):
    (latents / name).write_text(content)
    refuses(source_of(latents), f"{latents / name}: ")


def test_a_record_that_unpacks_to_more_than_declared_is_a_bad_example(latents, made, monkeypatch):
    """To a gigabyte, if all of it were unpacked."""
    asked, real = [], zlib.decompressobj

    class Counted:
        def decompress(self, content, most):
            asked.append(most)
            return real().decompress(zlib.compress(bytes(10_000)), most)

    monkeypatch.setattr(zlib, "decompressobj", Counted)
    changed(
        latents, "features.json", lambda c: features(c)["moments"]["tensor"].update(encoding="zlib")
    )
    refuses(source_of(latents), "record 0 holds no moments of float32", error=BadExample)
    assert set(asked) == {4 * 8 * 2 * 3 + 1}


def test_examples_without_labels_are_of_class_0_where_there_is_one(tmp_path):
    kinds = tfds_format.features_of(MOMENTS, CLASSES)
    kinds = tfds.features.FeaturesDict({"moments": kinds["moments"]})
    rows = [{"moments": row["moments"]} for row in examples(MOMENTS)]
    folder = write(tmp_path / "toy", rows, kinds)
    batch = use(source_of(folder, num_classes=1))
    np.testing.assert_array_equal(batch["label"], np.zeros(10))
    assert batch["label"].dtype == np.int32
    refuses(source_of(folder), "latents need label (but with num_classes = 1)")


def test_images_can_be_read_whatever_their_labels(tmp_path):
    """As those of ImageNet's test split, which has -1 for each."""
    folder = write_tfds(tmp_path, labels=[-1] * 5)
    found = use(tfds_source(folder).unlabelled())
    np.testing.assert_array_equal(found["label"], np.zeros(5))
    np.testing.assert_array_equal(found["stored"], expected_pictures())
    refuses(tfds_source(folder), "label -1 must lie in 0..4")


def test_images_without_labels_are_of_class_0_where_there_is_one(tmp_path):
    folder = write_tfds(
        tmp_path, features={name: IMAGENET[name] for name in ("image", "file_name")}
    )
    np.testing.assert_array_equal(use(tfds_source(folder, num_classes=1))["label"], np.zeros(5))
    refuses(tfds_source(folder), "need image of uint8 and label (but with num_classes = 1)")
