"""Data sets in the layout of TensorFlow Datasets are written, read, and refused where they are bad.

TFDS itself is the other side: it opens what is written here, and it encodes what is read here.
"""

import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from places import HELPERS, ROOT
from sources import refuses, use
from tensorflow_datasets.proto import tf_example_pb2
from tfds_latents import (
    CLASSES,
    FILES,
    IMAGES,
    LABELS,
    LENGTHS,
    MOMENTS,
    SHARDS,
    TWINS,
    arrays,
    examples,
    source_of,
    write,
    write_latents,
)

from ig_jax.data import provenance
from ig_jax.data.sources.array_record import ArrayRecord
from ig_jax.data.tfds import format as tfds_format
from ig_jax.data.tfds import reader as tfds_reader
from ig_jax.errors import BadExample
from ig_jax.types import Encoded

ANY = np.array([7, 0, 9, 7, 3])  # out of order, one twice, of both shards


@pytest.fixture
def latents(tmp_path):
    return write_latents(tmp_path / "toy")


def test_a_shard_is_named_as_tfds_names_it():
    name = tfds_format.shard_name("imagenet2012", "train", 17, 1024)
    assert name == "imagenet2012-train.array_record-00017-of-01024"


@pytest.mark.parametrize("shapes", [MOMENTS, TWINS], ids=["moments", "twins"])
def test_tfds_opens_what_is_written(tmp_path, shapes):
    builder = tfds.builder_from_directory(write_latents(tmp_path / "toy", shapes))
    split = builder.info.splits["train"]
    assert (builder.name, builder.info.description, split.num_examples) == ("toy", "noise", 10)
    assert split.shard_lengths == LENGTHS and builder.info.features["label"].num_classes == CLASSES
    read = list(builder.as_data_source("train"))
    for name, expected in arrays(shapes).items():
        np.testing.assert_array_equal(np.stack([example[name] for example in read]), expected)
    assert [example["label"] for example in read] == LABELS
    assert [example["file_name"].decode() for example in read] == FILES
    assert split.num_bytes == sum((tmp_path / "toy" / name).stat().st_size for name in SHARDS)


def raw_messages(builder):
    return builder.as_data_source(
        "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_examples_give_the_same_bytes(tmp_path):
    """In another process, too: there the order of features in a message would be another."""
    here = contents(write_latents(tmp_path / "here", TWINS))
    assert sorted(here) == ["dataset_info.json", "features.json", *SHARDS]
    script = "import sys, pathlib, tfds_latents as t\n"
    script += "t.write_latents(pathlib.Path(sys.argv[1]), t.TWINS)"
    path = {"PYTHONPATH": os.pathsep.join(map(str, (HELPERS, ROOT)))}
    environment = {**os.environ, **path, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment)
    assert contents(tmp_path / "there") == here


def test_a_shard_appears_when_it_is_complete(tmp_path):
    def broken():
        yield from examples(MOMENTS)[:3]
        assert not file.exists()
        raise KeyboardInterrupt

    file = tmp_path / SHARDS[0]
    with pytest.raises(KeyboardInterrupt):
        tfds_format.write_shard(file, broken(), tfds_format.features_of(MOMENTS, CLASSES))
    assert list(tmp_path.iterdir()) == []


def test_moments_come_channels_last_in_the_order_of_records(latents):
    source = source_of(latents)
    assert isinstance(source, Encoded)
    assert (len(source), source.stored_shape, source.stored_dtype) == (10, (2, 3, 8), np.float32)
    assert (source.codec, source.record(), source.held_out()) == ("sd_vae", None, None)
    batch = use(source)
    assert batch["stored"].dtype == np.float32 and batch["label"].dtype == np.int32
    expected = arrays(MOMENTS)["moments"].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(batch["stored"], expected)
    np.testing.assert_array_equal(batch["label"], LABELS)
    assert [source.name(index) for index in range(IMAGES)] == FILES


def test_a_twin_stands_behind_its_latent(tmp_path):
    source = source_of(write_latents(tmp_path / "toy", TWINS))
    assert (source.stored_shape, source.codec) == ((2, 3, 10), "va_vae")
    stored, expected = use(source)["stored"], arrays(TWINS)
    np.testing.assert_array_equal(stored[..., :5], expected["latents"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(stored[..., 5:], expected["latents_flip"].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("indices", [ANY, np.array([5]), np.array([], int)])
def test_any_batch_is_its_examples_one_by_one(latents, indices):
    batch, whole = source_of(latents).batch(indices), use(source_of(latents))
    np.testing.assert_array_equal(batch["stored"], whole["stored"][indices])
    np.testing.assert_array_equal(batch["label"], whole["label"][indices])


def test_threads_may_read_at_once(latents):
    source, whole = source_of(latents), use(source_of(latents))
    orders = [np.random.default_rng(seed).permutation(IMAGES) for seed in range(40)]
    with ThreadPoolExecutor(4) as readers:
        for order, batch in zip(orders, readers.map(source.batch, orders), strict=True):
            np.testing.assert_array_equal(batch["stored"], whole["stored"][order])


@pytest.mark.parametrize("encoding", ["none", "bytes", "zlib"])
def test_every_encoding_of_tfds_is_read(tmp_path, encoding):
    tensors = {
        name: tfds.features.Tensor(shape=shape, dtype=np.float32, encoding=encoding)
        for name, shape in TWINS.items()
    }
    label = tfds.features.ClassLabel(num_classes=CLASSES)
    features = tfds.features.FeaturesDict({**tensors, "label": label})
    rows = [{n: v for n, v in row.items() if n != "file_name"} for row in examples(TWINS)]
    source = source_of(write(tmp_path / "toy", rows, features))
    expected = source_of(write_latents(tmp_path / "other", TWINS))
    np.testing.assert_array_equal(use(source)["stored"], use(expected)["stored"])


def test_an_example_without_a_file_name_is_called_by_its_shard_and_record(tmp_path):
    features = tfds_format.features_of(MOMENTS, CLASSES)
    features = tfds.features.FeaturesDict({n: features[n] for n in ("moments", "label")})
    rows = [{n: row[n] for n in ("moments", "label")} for row in examples(MOMENTS)]
    source = source_of(write(tmp_path / "toy", rows, features))
    assert [source.name(3), source.name(4)] == [f"{SHARDS[0]}:3", f"{SHARDS[1]}:0"]


def test_a_shard_without_examples_shifts_nothing(tmp_path):
    features, rows = tfds_format.features_of(MOMENTS, CLASSES), examples(MOMENTS)
    for count in (0, IMAGES):
        tfds_format.write_shard(tmp_path / SHARDS[0], rows[:count], features)
        tfds_format.write_shard(tmp_path / SHARDS[1], rows[count:], features)
        numbers = dict(shard_lengths=[count, IMAGES - count], num_bytes=1)
        texts = dict(name="toy", split="train", description="")
        tfds_format.write_metadata(tmp_path, features=features, **numbers, **texts)
        np.testing.assert_array_equal(use(source_of(tmp_path))["label"], LABELS)


def test_a_part_of_a_split_is_a_source(latents):
    part, whole = source_of(latents, "train[20%:70%]"), use(source_of(latents))
    np.testing.assert_array_equal(use(part)["stored"], whole["stored"][2:7])
    assert [part.name(index) for index in range(5)] == FILES[2:7]


def record_of(codec):
    numbers = dict(image_size=256, examples=10, mean=(0.0,), std=(1.0,), input_range=(-1.0, 1.0))
    rest = dict(autoencoder="", crop="", skipped=(), source={}, versions={})
    return provenance.Record(codec=codec, **numbers, **rest)


def test_a_record_beside_the_shards_tells_the_codec(latents):
    (latents / provenance.PROVENANCE_FILE).write_text(provenance.dumps(record_of("another")))
    source = source_of(latents)
    assert source.codec == "another" and source.record() == record_of("another")


def test_nothing_is_read_at_construction(tmp_path):
    refuses(source_of(tmp_path / "absent"), "absent: is no folder")


@pytest.mark.parametrize(
    "settings, words",
    [(("", "train", 7), "path = ''"), (("a", "", 7), "split = ''"), (("a", "b", 0), "num_classes")],
)
def test_settings_that_no_data_set_has_are_refused(settings, words):
    with pytest.raises(ValueError, match=f"^{words}.*: must "):
        ArrayRecord(*settings)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_missing_description_is_named(latents, name):
    (latents / name).unlink()
    refuses(source_of(latents), f"{latents}: holds no {name}", "imagenet2012/5.1.0")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ['{"featu', "{}", "[]", ""])
def test_a_description_that_is_cut_off_is_named(latents, name, content):
    (latents / name).write_text(content)
    refuses(source_of(latents), f"{latents / name}: ", "; copy ")


@pytest.mark.parametrize(
    "template",
    [
        *("{DATASET:>9999999999}", "{SPLIT.__class__}", "{SPLIT[0]}", "{DATASET!r}", "{0}", "{}"),
        *("{DATASET", "}", "{{DATASET}}", "{COUNT}", "{DATASET}" * 201),
    ],
)
def test_a_template_of_names_that_is_a_program_is_refused(latents, template):
    file = latents / "dataset_info.json"
    found = json.loads(file.read_text())
    found["splits"][0]["filepathTemplate"] = template
    file.write_text(json.dumps(found))
    refuses(source_of(latents), f"{file}: has the template ", "with TFDS's placeholders")


def test_a_name_of_a_shard_that_is_too_long_is_that_of_no_file(latents):
    file = latents / "dataset_info.json"
    found = json.loads(file.read_text())
    found["splits"][0]["filepathTemplate"] = "{SPLIT}" * 36
    found["splits"][0]["name"] = "train" * 9
    file.write_text(json.dumps(found))
    refuses(source_of(latents, "train" * 9), "is missing")


def test_a_data_set_without_a_template_has_the_usual_names(latents):
    file = latents / "dataset_info.json"
    found = json.loads(file.read_text())
    del found["splits"][0]["filepathTemplate"]
    file.write_text(json.dumps(found))
    assert len(source_of(latents)) == IMAGES


def test_a_data_set_of_tfrecord_files_is_refused_with_the_way_to_build_it_again(latents):
    info = latents / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    refuses(source_of(latents), "is stored as 'tfrecord'", "file_format='array_record'")


@pytest.mark.parametrize("split", ["test", "train[", "train[:x]"])
def test_an_unknown_split_is_refused_with_those_there_are(latents, split):
    refuses(source_of(latents, split), f"has no split '{split}'; name one of train")


def test_a_split_without_examples_is_refused(latents):
    refuses(source_of(latents, "train[:0]"), "'train[:0]' holds no examples")
    info = json.loads((latents / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = []
    (latents / "dataset_info.json").write_text(json.dumps(info))
    refuses(source_of(latents), "'train' holds no examples")


def test_a_missing_shard_is_named(latents):
    (latents / SHARDS[1]).unlink()
    refuses(source_of(latents), f"{latents / SHARDS[1]}: is missing")


@pytest.mark.parametrize("size", [0, 100, 65536, -1])
def test_a_shard_that_is_cut_off_is_named(latents, size):
    file = latents / SHARDS[1]
    file.write_bytes(file.read_bytes()[:size])
    refuses(source_of(latents), f"{file}: is cut off or cannot be opened (", "copy it again")


@pytest.fixture
def one_more_file(latents):
    """Enough to read the JSON files and to open one shard of the two."""
    use(source_of(latents))  # so that all imports are done
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/dev/fd")))
    fillers = [os.dup(0)]
    while fillers[-1] <= highest:  # numbers below that are free would count for nothing
        fillers.append(os.dup(0))
    free = fillers.pop()
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    for filler in fillers:
        os.close(filler)


def test_as_many_files_as_there_are_shards_may_be_open(latents, one_more_file):
    assert len(source_of(latents)) == IMAGES


def test_too_many_open_files_are_told_as_such(latents, one_more_file, monkeypatch):
    monkeypatch.setattr(tfds_reader, "_allow_open_files", lambda count: None)
    refuses(source_of(latents), f"{latents}", "Too many open files", "raise `ulimit -n`")


def test_a_shard_with_other_numbers_of_examples_than_told_is_named(latents):
    features = tfds_format.features_of(MOMENTS, CLASSES)
    tfds_format.write_shard(latents / SHARDS[1], examples(MOMENTS)[:5], features)
    refuses(source_of(latents), f"{SHARDS[1]}: holds 5 examples", "dataset_info.json says 6")


def test_a_corrupt_record_is_a_bad_example_and_its_neighbours_are_read(latents):
    file = latents / SHARDS[1]
    content = bytearray(file.read_bytes())
    place = content.index(arrays(MOMENTS)["moments"][6].tobytes())
    content[place + 8] ^= 1
    file.write_bytes(content)
    refuses(source_of(latents), f"{file}: record 2 cannot be read (Corrupted", error=BadExample)
    source_of(latents).batch(np.array([5, 7]))


def planted(folder, index, changed):
    """The data set with another example number `index`, which TFDS itself would not encode."""
    example = tf_example_pb2.Example()
    for name, value in changed.items():
        feature = example.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.extend(value)
    messages = list(raw_messages(tfds.builder_from_directory(folder)))
    messages[index] = example.SerializeToString() if changed else b"\xff"
    for name, part in zip(SHARDS, (messages[:4], messages[4:]), strict=True):
        writer = ArrayRecordWriter(str(folder / name), tfds_format.WRITER_OPTIONS)
        for message in part:
            writer.write(message)
        writer.close()
    return folder


GOOD = {"moments": bytes(192), "label": [1]}
BAD = [
    ({}, "cannot be read ("),
    ({**GOOD, "moments": bytes(188)}, "holds no moments of float32 (8, 2, 3)"),
    ({**GOOD, "moments": bytes(190)}, "holds no moments of float32 (8, 2, 3)"),
    ({"label": [1]}, "holds no moments of float32 (8, 2, 3)"),
    ({"moments": bytes(192)}, "holds no label"),
    ({**GOOD, "label": [1, 2]}, "holds no label"),
    ({**GOOD, "label": b"cat"}, "holds no label"),
    ({**GOOD, "moments": np.full(48, np.nan, np.float32).tobytes()}, "holds NaN or infinity"),
    ({**GOOD, "moments": bytes(188) + np.float32(np.inf).tobytes()}, "holds NaN or infinity"),
]


@pytest.mark.parametrize("index", [1, 6])
@pytest.mark.parametrize("changed, words", BAD)
def test_an_example_that_cannot_be_used_is_named(latents, index, changed, words):
    source = source_of(planted(latents, index, changed))
    place = f"{latents / SHARDS[index // 4]}: record {index % 4} {words}"
    refuses(source, place, error=BadExample)
    source.batch(np.array([0, 2, 5, 7]))


def test_an_example_that_cannot_be_unpacked_is_named(latents):
    described = latents / "features.json"
    described.write_text(described.read_text().replace('"bytes"', '"zlib"'))
    refuses(source_of(latents), "record 0 holds no moments of float32", error=BadExample)


def test_features_that_claim_more_than_there_is_take_no_memory(latents):
    file = latents / "features.json"
    text = file.read_text()
    claimed = text.replace('"3"', '"1000000000"')
    assert claimed != text
    file.write_text(claimed)
    refuses(source_of(latents), "as the shape of moments", "67,108,864 values at most")


def test_the_good_example_among_the_bad_is_good(latents):
    use(source_of(planted(latents, 6, GOOD)))


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_outside_of_the_classes_is_named_when_it_is_read(latents, label):
    source = source_of(planted(latents, 6, {**GOOD, "label": [label]}))
    refuses(source, f"{SHARDS[1]}: record 2: label {label} must lie in 0..6")
    source.batch(np.array([5, 7]))


TENSOR = tfds.features.Tensor
LABEL = tfds.features.ClassLabel(num_classes=CLASSES)
FEATURES = [
    ({"image": tfds.features.Image(), "label": LABEL}, "names image, label; latents need"),
    ({"moments": TENSOR(shape=(8, 2, 2), dtype=np.float32)}, "names moments; latents need label"),
    ({"latents": TENSOR(shape=(8, 2, 2), dtype=np.float32), "label": LABEL}, "latents_flip"),
    ({"moments": TENSOR(shape=(8, 2, 2), dtype=np.float64), "label": LABEL}, "dtype=float64"),
    ({"moments": TENSOR(shape=(4, 2, 2), dtype=np.float32), "label": LABEL}, "shape=(8, height"),
    ({"moments": TENSOR(shape=(8, 4), dtype=np.float32), "label": LABEL}, "must be Tensor("),
    ({"moments": TENSOR(shape=(8, 2, None), dtype=np.float32), "label": LABEL}, "must be Tensor("),
    ({"moments": tfds.features.Text(), "label": LABEL}, "moments is Text"),
    (
        {
            "latents": TENSOR(shape=(4, 2, 2), dtype=np.float32),
            "latents_flip": TENSOR(shape=(4, 2, 3), dtype=np.float32),
            "label": LABEL,
        },
        "latents (4, 2, 2) and latents_flip (4, 2, 3) must be alike",
    ),
]


@pytest.mark.parametrize("features, words", FEATURES)
def test_features_that_are_no_latents_are_refused(latents, features, words):
    tfds.features.FeaturesDict(features).save_config(latents)
    refuses(source_of(latents), f"{latents}/features.json: ", words)
