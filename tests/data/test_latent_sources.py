"""Published ImageNet latents are read as they are, and what is wrong with them is named.

Both layouts are written here as their own tools write them: dataset.json with one .npy file an
image (numpy), and safetensors shards with header strings (the safetensors library).
"""

import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from sources import refuses, use

from ig_jax.data import provenance, read_pool
from ig_jax.data.sources.npy_folder import NpyFolder
from ig_jax.data.sources.safetensors_shards import SafetensorsShards
from ig_jax.errors import BadExample, UserError
from ig_jax.types import Encoded

IMAGES = 12
CLASSES = 7
LABELS = [(5 * i + 3) % CLASSES for i in range(IMAGES)]
NAMES = [f"{i // 5:05d}/img-mean-std-{i:08d}.npy" for i in range(IMAGES)]  # three folders
FIRST = NAMES[0]
ANY = np.array([7, 0, 11, 7, 3])  # out of order, one twice


def moments(shape=(8, 2, 2)):
    return np.random.default_rng(0).normal(size=(IMAGES, *shape)).astype(np.float32)


def write_labels(folder, entries):
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))


@pytest.fixture
def latents(tmp_path):
    """The folder that has vae-sd in it; dataset.json is not sorted."""
    folder = tmp_path / "imagenet" / "vae-sd"
    for name, array in zip(NAMES, moments(), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, array)
    write_labels(folder, [[NAMES[i], LABELS[i]] for i in np.random.default_rng(1).permutation(12)])
    return folder.parent


def zipped(folder, compression=zipfile.ZIP_STORED):
    archive = folder.parent / "latents.zip"
    with zipfile.ZipFile(archive, "w", compression) as writer:
        for file in reversed(sorted(folder.rglob("*"))):
            if file.is_file():
                member = zipfile.ZipInfo(file.relative_to(folder).as_posix())
                member.compress_type = compression
                member.extra = b"UT\x05\x00\x01\x00\x00\x00\x00"  # a time stamp, as `zip` adds
                writer.writestr(member, file.read_bytes())
    return archive


def npy(path, num_classes=CLASSES):
    return NpyFolder(str(path), num_classes)


def test_a_folder_gives_mean_and_std_channels_last_in_the_order_of_names(latents):
    source = npy(latents)
    assert isinstance(source, Encoded)
    assert (len(source), source.stored_shape, source.stored_dtype) == (12, (2, 2, 8), np.float32)
    batch = use(source)
    assert batch["stored"].dtype == np.float32 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["stored"], moments().transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(batch["label"], LABELS)
    assert (source.codec, source.record(), source.held_out()) == ("sd_vae", None, None)
    assert [source.name(index) for index in range(IMAGES)] == NAMES


def test_a_height_is_not_taken_for_a_width(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(48, dtype=np.float32).reshape(8, 2, 3))
    write_labels(tmp_path, [["a.npy", 0]])
    assert use(npy(tmp_path))["stored"].shape == (1, 2, 3, 8)


def places_of_the_tree(latents):
    return [latents, latents / "vae-sd", zipped(latents), zipped(latents / "vae-sd")]


def test_the_folder_around_it_and_both_kinds_of_zip_are_the_same_data(latents):
    for place in places_of_the_tree(latents):
        batch = npy(place).batch(ANY)
        np.testing.assert_array_equal(batch["stored"], moments()[ANY].transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(batch["label"], np.array(LABELS)[ANY])


def record_of(codec):
    numbers = dict(image_size=16, examples=12, mean=(0.0,), std=(1.0,), input_range=(-1.0, 1.0))
    rest = dict(autoencoder="", crop="", skipped=(), source={}, versions={})
    return provenance.Record(codec=codec, **numbers, **rest)


def test_a_record_beside_the_labels_tells_the_codec_in_folder_and_zip(latents):
    (latents / "vae-sd" / provenance.PROVENANCE_FILE).write_text(
        provenance.dumps(record_of("another"))
    )
    for place in places_of_the_tree(latents):
        assert npy(place).codec == "another" and npy(place).record() == record_of("another")


def test_a_record_that_is_cut_off_is_named_in_folder_and_zip(latents):
    (latents / "vae-sd" / provenance.PROVENANCE_FILE).write_text('{"codec": "sd_v')
    refuses(npy(latents), f"vae-sd/{provenance.PROVENANCE_FILE}: is cut off or no record")
    refuses(
        npy(zipped(latents)),
        f"latents.zip/vae-sd/{provenance.PROVENANCE_FILE}: is cut off or no record",
    )


def test_a_record_beside_shards_tells_the_codec(shards):
    (shards / provenance.PROVENANCE_FILE).write_text(provenance.dumps(record_of("another")))
    assert sharded(shards).codec == "another" and sharded(shards).record() == record_of("another")


@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_one_thread_reads_what_many_read(latents, monkeypatch, count):
    indices = np.random.default_rng(count).integers(0, IMAGES, count)
    many = npy(latents).batch(indices)
    monkeypatch.setattr(read_pool, "THREADS", 1)
    one = npy(latents).batch(indices)
    np.testing.assert_array_equal(many["stored"], one["stored"])
    np.testing.assert_array_equal(many["label"], one["label"])


def test_a_header_padded_in_another_way_is_read_all_the_same(latents):
    file = latents / "vae-sd" / NAMES[3]
    data = file.read_bytes()
    text = data[10:128].rstrip() + b"\n"
    file.write_bytes(data[:8] + len(text).to_bytes(2, "little") + text + data[128:])
    np.testing.assert_array_equal(use(npy(latents))["stored"], moments().transpose(0, 2, 3, 1))


def test_nothing_is_read_at_construction(tmp_path):
    for cls in (NpyFolder, SafetensorsShards):
        source = cls(str(tmp_path / "absent"), 10)
        with pytest.raises(UserError, match="absent: is "):
            len(source)


@pytest.mark.parametrize("cls", [NpyFolder, SafetensorsShards])
@pytest.mark.parametrize("settings", [("", 10), ("latents", 0)])
def test_settings_that_no_data_set_has_are_refused(cls, settings):
    with pytest.raises(ValueError, match="^(path = ''|num_classes = 0): must "):
        cls(*settings)


def test_a_folder_without_latents_is_refused(tmp_path):
    refuses(npy(tmp_path), str(tmp_path), "no .npy files")
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("notes.txt", "absent.zip"):
        refuses(npy(tmp_path / name), f"{name}: is neither a folder nor a .zip file")


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"labels": [["a', "is cut off or no JSON"),
        ("[]", "must hold"),
        ('{"labels": "cat"}', "must hold"),
        ('{"names": []}', f"gives no labels, but num_classes = {CLASSES}; set num_classes = 1"),
        ('{"labels": null}', f"gives no labels, but num_classes = {CLASSES}; set num_classes = 1"),
        (f'{{"labels": [["{FIRST}", null]]}}', f"entry ['{FIRST}', None] must be"),
        (f'{{"labels": [["{FIRST}", "cat"]]}}', "must be [file, class number]"),
    ],
)
def test_a_file_of_labels_that_gives_none_is_refused(latents, content, words):
    (latents / "vae-sd" / "dataset.json").write_text(content)
    refuses(npy(latents), "vae-sd/dataset.json: ", words)


@pytest.mark.parametrize("content", ['{"labels": null}', "{}"])
@pytest.mark.parametrize("zip_it", [False, True])
def test_latents_without_labels_are_of_class_0_where_there_is_one(latents, content, zip_it):
    (latents / "vae-sd" / "dataset.json").write_text(content)
    expected = use(npy(latents, num_classes=1))
    found = use(npy(zipped(latents) if zip_it else latents, num_classes=1))
    np.testing.assert_array_equal(found["label"], np.zeros(len(found["label"])))
    np.testing.assert_array_equal(found["stored"], expected["stored"])


@pytest.mark.parametrize("name", [".hidden.npy", "__MACOSX/._a.npy", "._more/a.npy"])
def test_hidden_files_are_no_latents(latents, name):
    expected = use(npy(latents))
    (latents / "vae-sd" / name).parent.mkdir(exist_ok=True)
    (latents / "vae-sd" / name).write_bytes(b"no latent")
    for path in (latents, zipped(latents)):
        np.testing.assert_array_equal(use(npy(path))["stored"], expected["stored"])


def test_a_missing_file_of_labels_is_named_in_folder_and_zip(latents):
    (latents / "vae-sd" / "dataset.json").unlink()
    refuses(npy(latents), f"{latents}/vae-sd/dataset.json: is missing")
    refuses(npy(zipped(latents)), "latents.zip/vae-sd/dataset.json: is missing")


@pytest.mark.parametrize(
    "kept, words",
    [(11, f"{NAMES[11]} is not"), (7, f"{', '.join(NAMES[7:10])} and 2 others are not in it")],
)
def test_files_without_a_label_are_named_and_counted(latents, kept, words):
    write_labels(latents / "vae-sd", [[NAMES[i], LABELS[i]] for i in range(kept)])
    refuses(npy(latents), "dataset.json: ", words)


@pytest.mark.parametrize(
    "kept, words",
    [(10, f"{', '.join(NAMES[10:])} are in it"), (7, f"{', '.join(NAMES[7:10])} and 2 others are")],
)
def test_labels_without_a_file_are_named_and_counted(latents, kept, words):
    for name in NAMES[kept:]:
        (latents / "vae-sd" / name).unlink()
    refuses(npy(latents), "dataset.json: ", words, "not beside it")


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_outside_of_the_classes_is_named_with_its_file(latents, label):
    write_labels(latents / "vae-sd", [[NAMES[4], label]])
    refuses(npy(latents), f"label {label} of {NAMES[4]}", "0..6")


@pytest.mark.parametrize("which", [0, 6])  # the first file also tells the shape
@pytest.mark.parametrize(
    "size, words", [(200, "needs 128 bytes, but 72 are there"), (60, "cut off"), (0, "cut")]
)
def test_an_npy_file_that_is_cut_off_is_named(latents, which, size, words):
    file = latents / "vae-sd" / NAMES[which]
    file.write_bytes(file.read_bytes()[:size])
    refuses(npy(latents), NAMES[which], words, error=BadExample)
    refuses(npy(zipped(latents)), NAMES[which], words, error=BadExample)


@pytest.mark.parametrize("which", [0, 6])
@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((4, 2, 2), np.float32), "float32 (4, 2, 2), must hold float32 (8, "),
        (np.zeros((8, 4), np.float32), "(8, 4), must hold"),
        (np.zeros((1, 8, 2, 2), np.float32), "(1, 8, 2, 2), must hold"),
        (np.zeros((8, 2, 2), np.float16), "holds float16"),
        (np.zeros((8, 2, 2), ">f4"), "holds >f4"),
        (np.zeros((8, 2, 2), np.float32).transpose(0, 2, 1), "must be .npy version 1.0 in C"),
    ],
)
def test_an_npy_file_that_holds_something_else_is_named(latents, which, array, words):
    if "C" in words:
        array = np.asfortranarray(array)
    np.save(latents / "vae-sd" / NAMES[which], array)
    refuses(npy(latents), NAMES[which], words, error=BadExample)


def test_an_image_of_another_size_is_named(latents):
    np.save(latents / "vae-sd" / NAMES[6], np.zeros((8, 4, 4), np.float32))
    words = "holds (8, 4, 4), but the first file holds (8, 2, 2)"
    refuses(npy(latents), NAMES[6], words, error=BadExample)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_latent_that_is_not_finite_is_named_when_it_is_read(latents, value):
    array = moments()[6]
    array[7, 1, 1] = value
    np.save(latents / "vae-sd" / NAMES[6], array)
    refuses(npy(latents), NAMES[6], "NaN or infinity", error=BadExample)
    npy(latents).batch(np.array([5, 7]))


def test_a_file_that_vanishes_while_training_is_named(latents):
    source = npy(latents)
    assert len(source) == IMAGES
    (latents / "vae-sd" / NAMES[6]).unlink()
    refuses(source, NAMES[6], "cannot be read (No such file or directory)")


def test_a_zip_that_is_compressed_or_cut_off_is_refused(latents):
    archive = zipped(latents, zipfile.ZIP_DEFLATED)
    refuses(npy(archive), "latents.zip: ", "others are compressed")
    archive.write_bytes(archive.read_bytes()[:-200])
    refuses(npy(archive), "latents.zip: is cut off or no zip file")


# Shard -> its images, as three processes that take turns leave them; by path, not by image.
SHARDS = {
    "latents_rank01_shard000": [1, 4, 7],
    "latents_rank00_shard001": [9],
    "latents_rank02_shard000": [2, 5, 8, 11],
    "latents_rank00_shard000": [0, 3, 6],
    "latents_rank01_shard001": [10],
}
ORDER = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
ONE = "latents_rank01_shard000"


def tensors(images, shape=(3, 2, 2)):
    rng = np.random.default_rng(2)
    latents, flipped = rng.normal(size=(2, IMAGES, *shape)).astype(np.float32)
    labels = np.array(LABELS, np.int64)
    return {"latents": latents[images], "latents_flip": flipped[images], "labels": labels[images]}


def write_shard(folder, name, arrays):
    total = str(len(arrays.get("labels", [])))
    metadata = {"total_size": total, "dtype": "torch.float32", "device": "cuda:0"}
    save_file(arrays, folder / f"{name}.safetensors", metadata)


@pytest.fixture
def shards(tmp_path):
    for name, images in SHARDS.items():
        write_shard(tmp_path, name, tensors(images))
    (tmp_path / "latents_stats.pt").write_bytes(b"not a shard")
    return tmp_path


def sharded(path, num_classes=CLASSES):
    return SafetensorsShards(str(path), num_classes)


def test_shards_give_latent_and_twin_channels_last_in_the_order_of_paths(shards):
    source = sharded(shards)
    assert isinstance(source, Encoded)
    assert (len(source), source.stored_shape, source.stored_dtype) == (12, (2, 2, 6), np.float32)
    batch, expected = use(source), tensors(ORDER)
    assert batch["stored"].dtype == np.float32 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(
        batch["stored"][..., :3], expected["latents"].transpose(0, 2, 3, 1)
    )
    np.testing.assert_array_equal(
        batch["stored"][..., 3:], expected["latents_flip"].transpose(0, 2, 3, 1)
    )
    np.testing.assert_array_equal(batch["label"], expected["labels"])
    assert (source.codec, source.record(), source.held_out()) == ("va_vae", None, None)


def test_a_row_of_a_shard_is_called_by_its_shard_and_place(shards):
    write_shard(shards, "latents_rank00_shard002", tensors([]))  # without examples
    source = sharded(shards)
    names = [source.name(index) for index in range(IMAGES)]
    expected = [
        f"{shard}.safetensors:{row}"
        for shard in sorted(SHARDS)
        for row in range(len(SHARDS[shard]))
    ]
    assert names == expected


def test_any_rows_of_any_shards_are_read_in_the_order_asked_for(shards):
    source = sharded(shards)
    batch, whole = source.batch(ANY), use(source)
    np.testing.assert_array_equal(batch["stored"], whole["stored"][ANY])
    np.testing.assert_array_equal(batch["label"], whole["label"][ANY])


def test_an_empty_shard_among_others_shifts_nothing(shards):
    expected = use(sharded(shards))
    write_shard(shards, "latents_rank00_shard002", tensors([]))
    np.testing.assert_array_equal(use(sharded(shards))["stored"], expected["stored"])


def test_shards_are_opened_once(shards):
    source = sharded(shards)
    expected = use(source)
    for file in shards.glob("*.safetensors"):
        file.unlink()
    np.testing.assert_array_equal(use(source)["stored"], expected["stored"])


def test_a_shard_whose_arrays_start_anywhere_is_read(shards):
    """The format asks for no alignment, and other writers give none."""
    expected = use(sharded(shards))
    file = shards / f"{ONE}.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].rstrip() + b" "
    text += b" " * (len(text) % 2 == 0)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    np.testing.assert_array_equal(use(sharded(shards))["stored"], expected["stored"])


def test_a_folder_without_shards_is_refused(tmp_path):
    refuses(sharded(tmp_path), str(tmp_path), "no .safetensors files")
    refuses(sharded(tmp_path / "absent"), "absent: is no folder")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_shard_that_is_cut_off_is_named(shards, size):
    file = shards / f"{ONE}.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refuses(sharded(shards), f"{ONE}.safetensors: is cut off")


def test_a_file_that_is_no_shard_is_named(shards):
    (shards / "pytorch.safetensors").write_bytes(b"PK\x03\x04" + bytes(range(100)))
    refuses(sharded(shards), "pytorch.safetensors: is cut off or no safetensors file")


@pytest.mark.parametrize("name", ["latents", "latents_flip", "labels"])
def test_an_array_that_a_shard_lacks_is_named(shards, name):
    arrays = tensors(SHARDS[ONE])
    del arrays[name]
    write_shard(shards, ONE, arrays)
    refuses(sharded(shards), f"{ONE}.safetensors: holds no '{name}'")


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"latents": np.zeros((3, 3, 2, 2), np.float16)}, "latents is of dtype F16, must be F32"),
        ({"labels": np.zeros(3, np.int32)}, "labels is of dtype I32, must be I64"),
        ({"labels": np.zeros(4, np.int64)}, "labels (4,) must be"),
        ({"latents_flip": np.zeros((3, 3, 2, 1), np.float32)}, "latents_flip (3, 3, 2, 1)"),
        (tensors([1, 4, 7], (3, 4)), "latents (3, 3, 4)"),
        (tensors([1, 4, 7], (3, 4, 4)), "(3, 4, 4), but latents_rank00_shard000.safetensors holds"),
    ],
)
def test_a_shard_that_holds_something_else_is_named(shards, changed, words):
    write_shard(shards, ONE, {**tensors(SHARDS[ONE]), **changed})
    refuses(sharded(shards), f"{ONE}.safetensors: ", words)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_outside_of_the_classes_is_named_with_its_shard(shards, label):
    labels = np.array([0, 0, label], np.int64)
    write_shard(shards, ONE, {**tensors(SHARDS[ONE]), "labels": labels})
    refuses(sharded(shards), f"{ONE}.safetensors: label {label} of latent 2 ", "0..6")


@pytest.mark.parametrize("name", ["latents", "latents_flip"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_of_a_shard_that_is_not_finite_is_named_when_it_is_read(shards, name, value):
    arrays = tensors(SHARDS[ONE])
    arrays[name][1, 2, 1, 1] = value
    write_shard(shards, ONE, arrays)
    words = "NaN or infinity"
    refuses(sharded(shards), f"{ONE}.safetensors: latent 1 ", words, error=BadExample)
    sharded(shards).batch(np.array([4, 6]))  # its neighbours in that shard


# Shards whose header says what is not so


def write_raw(folder, header, data, name=ONE):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / f"{name}.safetensors").write_bytes(content)


def entries(**changed):
    """The header of a shard of four latents in 288 bytes, and what is changed in its first."""
    latents = {"dtype": "F32", "shape": [4, 2, 2, 2], "data_offsets": [0, 128]}
    return {
        "latents": {k: v for k, v in (latents | changed).items() if v is not None},
        "latents_flip": {"dtype": "F32", "shape": [4, 2, 2, 2], "data_offsets": [128, 256]},
        "labels": {"dtype": "I64", "shape": [4], "data_offsets": [256, 288]},
    }


def test_a_shard_written_by_hand_is_read(tmp_path):
    write_raw(tmp_path, entries(), bytes(288))
    assert use(sharded(tmp_path))["stored"].shape == (4, 2, 2, 4)


OFFSETS = [
    *([-128, 0], [-(10**6), 128], [0, 127], [0, 129], [1, 128], [4, 132], [128, 0], [128, 256]),
    *([10**9, 10**9 + 128], [10**9, 128], [2**63, 2**63 + 128], [-(2**63), 128], [10**30, 10**30]),
    *([0.0, 128.0], ["0", "128"], [True, 128], [None, 128], [0], [0, 64, 128], [], 5, {}, "0"),
]
SHAPES = [
    *([10**15, 2, 2, 2], [2**62, 2, 2, 2], [4, 2, 2], [5, 2, 2, 2], [-4, -2, 2, 2], [0, 2, 2, 2]),
    *(
        [4.0, 2, 2, 2],
        ["4", 2, 2, 2],
        [True, 16, 2, 1],
        [1] * 40 + [32],
        [[4], 2, 2, 2],
        32,
        {},
        "4",
    ),
    [4, 0, 2, 2],
]


@pytest.mark.parametrize(
    "changed",
    [
        *({"data_offsets": offsets} for offsets in [*OFFSETS, None]),
        *({"shape": shape} for shape in [*SHAPES, None]),
        *({"dtype": dtype} for dtype in (4, ["F32"], {}, None, "F64")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["latents", "more"])
def test_an_array_that_is_not_where_and_what_its_header_says_is_named(tmp_path, changed, name):
    """Also one that training does not use: where it lies tells where the others do."""
    header = entries(**changed)
    if name == "more":
        header = {"more": header["latents"], **{n: e for n, e in header.items() if n != "latents"}}
    write_raw(tmp_path, header, bytes(288))
    refuses(sharded(tmp_path), f"{ONE}.safetensors: is cut off or no safetensors file (")


@pytest.mark.parametrize(
    "header, words",
    [
        (b"", "no JSON"),
        (b"null", "its header is no JSON object"),
        (b"[1,2]", "its header is no JSON object"),
        (b"5", "its header is no JSON object"),
        (b"{}", "its arrays are of 0 bytes, but 288 are there"),
        (b'{"latents": null}', "'latents' is None"),
        (b'{"latents": [1]}', "'latents' is [1]"),
        (b'{"latents": 5, "latents": 6}', "names 'latents' twice"),
        (b"[" * 10**5, "nested more than 64 levels"),
        (b'{"a":' * 10**5, "nested more than 64 levels"),
        (b"\xff" * 100, "no JSON"),
        (b'{"latents": {"dtype": "F32", "shape": [' + b"1," * 10**5 + b"1]}}", "'latents' is {"),
        (b'{"latents": {"shape": [' + b"9" * 5000 + b"]}}", "no JSON"),
    ],
    ids=range(13),
)
def test_a_header_that_is_none_is_named(tmp_path, header, words):
    write_raw(tmp_path, header, bytes(288))
    refuses(sharded(tmp_path), f"{ONE}.safetensors: ", words)


@pytest.mark.parametrize("length", [1, 200, 2**32, 2**63, 2**64 - 1])
def test_a_header_of_another_length_than_it_has_is_named(tmp_path, length):
    write_raw(tmp_path, entries(), bytes(288))
    file = tmp_path / f"{ONE}.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refuses(sharded(tmp_path), f"{ONE}.safetensors: is cut off or no")


def test_bytes_that_belong_to_no_array_are_named(tmp_path):
    write_raw(tmp_path, entries(), bytes(289))
    refuses(sharded(tmp_path), "its arrays are of 288 bytes, but 289 are there")


def test_shards_without_examples_are_refused(shards):
    for file in shards.glob("*.safetensors"):
        write_shard(shards, file.stem, tensors([]))
    refuses(sharded(shards), "its shards hold no latents")


def test_what_a_mac_leaves_beside_a_shard_is_not_one(shards):
    (shards / f"._{ONE}.safetensors").write_bytes(b"\0\5\26\7")
    assert len(sharded(shards)) == IMAGES


# Files that claim more than they hold, and places that are no files


@pytest.mark.parametrize("which", [0, 6])
@pytest.mark.parametrize(
    "shape, words",
    [
        ("(8, 10000000, 10000000)", "needs 3200000000000000 bytes, but 128 are there"),
        ("(8, 40000, 40000)", "needs 51200000000 bytes, but 128 are there"),
        ("(8, 0, 1000000)", "must hold float32"),
        ("(8, 2, 1)", "needs 64 bytes, but 128 are there"),
    ],
)
def test_a_header_that_claims_more_than_there_is_takes_no_memory(latents, which, shape, words):
    file = latents / "vae-sd" / NAMES[which]
    content = file.read_bytes()
    # The header is padded with spaces: it keeps its length.
    claimed = content.replace(b"(8, 2, 2), }" + b" " * 20, shape.encode().ljust(29) + b", }")
    assert len(claimed) == len(content) and claimed != content
    file.write_bytes(claimed)
    tracemalloc.start()
    words = words if which == 0 or "must" in words else "but the first file holds (8, 2, 2)"
    refuses(npy(latents), NAMES[which], words, error=BadExample)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


@pytest.mark.parametrize("name", ["dataset.json", NAMES[0], NAMES[6], provenance.PROVENANCE_FILE])
@pytest.mark.parametrize(
    "make, kind",
    [(os.mkfifo, "a named pipe"), (lambda path: path.symlink_to("/dev/zero"), "a device")],
    ids=["pipe", "device"],
)
def test_what_is_no_regular_file_is_refused_at_once(latents, name, make, kind):
    file = latents / "vae-sd" / name
    file.unlink(missing_ok=True)
    make(file)
    refuses(npy(latents), f"{file}: is {kind}; name a regular file")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_shard_that_is_no_regular_file_is_refused_at_once(shards, make):
    make(shards / "a.safetensors")
    refuses(sharded(shards), "a.safetensors: is a", "name a regular file")


@pytest.mark.parametrize("label", [0, 3])
def test_a_file_with_two_labels_is_named(latents, label):
    pairs = [[NAMES[i], LABELS[i]] for i in range(IMAGES)]
    write_labels(latents / "vae-sd", [*pairs, [NAMES[4], label]])
    words = f"names {NAMES[4]} twice, of class {LABELS[4]} and {label}"
    refuses(npy(latents), "vae-sd/dataset.json: ", words)


@pytest.mark.parametrize(
    "entry", ["[true, 1]", '["a", true]', '["a", 1.0]', '["a"]', "{}", "[" * 99]
)
def test_an_entry_that_gives_no_label_is_named(latents, entry):
    (latents / "vae-sd" / "dataset.json").write_text(f'{{"labels": [{entry}]}}')
    refuses(npy(latents), "vae-sd/dataset.json: ")


def test_a_member_of_a_zip_outside_of_it_is_refused(latents):
    archive = zipped(latents)
    content = archive.read_bytes()
    place = content.rindex(b"PK\x01\x02") + 42  # of the last member's offset in the directory
    for offset in (0, 1, 100, len(content) - 10, 2**32 - 2):
        changed = content[:place] + offset.to_bytes(4, "little") + content[place + 4 :]
        archive.write_bytes(changed)
        with pytest.raises(UserError, match="latents.zip"):
            use(npy(archive))


@pytest.mark.parametrize("name", ["0/b\u00fccher.npy", "0/\u732b.npy"])
def test_names_beyond_ascii_are_read_from_a_zip(tmp_path, name):
    array = moments()[0]
    content = io.BytesIO()
    np.save(content, array)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, content.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": [[name, 1]]}))
    batch = use(npy(tmp_path / "a.zip"))
    np.testing.assert_array_equal(batch["stored"][0], array.transpose(1, 2, 0))
