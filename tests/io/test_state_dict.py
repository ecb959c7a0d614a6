"""State dicts as people have them: any kind of file, any wrapping of names, several at once."""

import json
import re
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_pickles import tensor, write

from ig_jax.errors import UserError
from ig_jax.io import state_dict, weights_part
from ig_jax.io.torch import writer as torch_writer

FIELD = "--checkpoint"


def weights(value=1.0, prefix=""):
    arrays = {"a.weight": np.full((2, 3), value), "b": np.full(4, value)}
    return {prefix + name: array.astype(np.float32) for name, array in arrays.items()}


def tensors(arrays):
    return {name: tensor(array) for name, array in arrays.items()}


def read(file, part=""):
    return state_dict.read(file, FIELD, part)


def refusal(file, part=""):
    with pytest.raises(UserError) as error:
        read(file, part)
    assert str(error.value).startswith(f"{FIELD}={file}")
    return str(error.value).removeprefix(f"{FIELD}={file}")


def is_weights(found, value=1.0):
    assert found.keys() == weights().keys()
    for name, array in weights(value).items():
        np.testing.assert_array_equal(found[name], array)


# What wraps names.

PREFIXES = [
    *("module.", "_orig_mod.", "model.", "ema_model.", "net.", "whatever."),
    *("module._orig_mod.", "_orig_mod.module.model.", "model.model.ema."),
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_what_all_names_begin_with_comes_off(tmp_path, prefix, suffix):
    file = tmp_path / f"weights.{suffix}"
    save = save_file if suffix == "safetensors" else write
    arrays = weights(prefix=prefix)
    save(arrays, file) if suffix == "safetensors" else save(file, tensors(arrays))
    is_weights(read(file).state)


def test_what_some_names_begin_with_stays():
    for names in (["layer.a", "b"], ["layer.a", "layers.b"], ["layer.a"]):
        arrays = {name: np.ones(2) for name in names}
        assert list(weights_part.choose(arrays, "", "").arrays) == names
    doubled = {"module.module.a": np.ones(2), "module.b": np.ones(3), "module.layer.c": np.ones(3)}
    assert list(weights_part.choose({"x": doubled}, "x/module", "").arrays) == ["a"]


CHOSEN = [
    # what the file holds -> (the name of the part, its value)
    ({"model": 1, "ema": 2}, "ema", 2),
    ({"ema": 2, "model": 1}, "ema", 2),
    ({"model": 1, "model_ema": 2}, "model_ema", 2),
    ({"state_dict": 1, "state_dict_ema": 2}, "state_dict_ema", 2),
    ({"net": 1, "ema_0.9999": 2}, "ema_0.9999", 2),
    ({"model_state_dict": 1}, "model_state_dict", 1),
    ({"generator": 1}, "generator", 1),
    ({"net": 1, "critic": 2}, "net", 1),
    ({"model": 1, "discriminator": 2}, "model", 1),
]


@pytest.mark.parametrize(("held", "name", "value"), CHOSEN)
def test_averaged_weights_are_preferred(held, name, value):
    loaded = {key: weights(number) for key, number in held.items()} | {
        "step": 3,
        "opt": {"state": {}},
    }
    found = weights_part.choose(loaded, "", "")
    assert found.name == name and not found.notes
    is_weights(found.arrays, value)


def test_settings_of_averaging_are_no_average():
    loaded = {"model": weights(), "ema_config": {}, "ema_decays": [0.9], "use_ema": None}
    assert weights_part.choose(loaded, "", "").notes == []


@pytest.mark.parametrize("empty", [None, {}, [], {"decay": 0.999}])
def test_an_empty_average_falls_back_with_a_word(empty):
    found = weights_part.choose({"model": weights(), "ema": empty}, "", "")
    assert found.name == "model"
    assert found.notes == ["'ema' in the file holds no weights: raw ones are taken"]
    is_weights(found.arrays)


def lightning(**groups):
    """Networks side by side in one state dict."""
    return {n: a for first, value in groups.items() for n, a in weights(value, f"{first}.").items()}


@pytest.mark.parametrize(
    ("groups", "name"),
    [
        ({"model": 1, "ema_model": 2}, "state_dict/ema_model"),
        ({"net": 1, "net_ema": 2, "vae": 3}, "state_dict/net_ema"),
        ({"model": 2, "vae": 3, "loss": 4}, "state_dict/model"),
    ],
)
def test_networks_side_by_side_in_one_state_dict_are_told_apart(groups, name):
    loaded = {"state_dict": lightning(**groups), "epoch": 4, "callbacks": {}}
    found = weights_part.choose(loaded, "", "")
    assert found.name == name
    is_weights(found.arrays, 2)


def test_the_counters_of_averaging_are_no_weights():
    counted = {"n_averaged": np.array(7), **weights(2, "module.")}
    is_weights(weights_part.choose({"ema": counted, "model": weights()}, "", "").arrays, 2)
    ema = {"initted": np.array(True), "step": np.array([3]), **weights(2, "ema_model."),
           **weights(1, "online_model.")}  # fmt: skip
    is_weights(weights_part.choose(ema, "", "").arrays, 2)
    extra = {**weights(), "b._extra_state": None, "num_updates": 3}
    is_weights(weights_part.choose({"ema": extra}, "", "").arrays)


def test_averages_without_names_get_those_of_the_raw_weights():
    listed = list(weights(2).values())
    raw = {"feat_rope.freqs_cos": np.ones(2), **weights(1)}
    loaded = {
        "model": raw,
        "ema": {"decay": 0.9, "shadow_params": listed, "collected_params": None},
    }
    found = weights_part.choose(loaded, "", "")
    assert found.name == "ema/shadow_params"
    np.testing.assert_array_equal(found.arrays.pop("feat_rope.freqs_cos"), np.ones(2))
    is_weights(found.arrays, 2)
    with pytest.raises(UserError, match="has 1 weights without their names, which are not"):
        weights_part.choose({"model": raw, "ema": listed[:1]}, "", "")
    undotted = {f"model_ema.{n.replace('.', '')}": a for n, a in weights(2).items()}
    found = weights_part.choose({"state_dict": weights(1) | undotted}, "", "")
    is_weights(found.arrays, 2)


def test_where_several_could_be_meant_the_user_chooses(tmp_path):
    file = write(
        tmp_path / "two.pt", {n: tensors(weights(i)) for i, n in enumerate(("ema1", "ema2"))}
    )
    said = refusal(file)
    assert "holds several networks: 'ema1', 'ema2'; say which: --part=NAME" in said
    is_weights(read(file, "ema2").state, 1)
    assert "has no part 'ema3'; it has 'ema1', 'ema2'" in refusal(file, "ema3")
    with pytest.raises(UserError, match="save the state dict that is meant to a file of its own"):
        state_dict.read(file, "data.codec.weights")
    save_file(weights(), tmp_path / "one.safetensors")
    assert "has no parts, so none named 'ema'" in refusal(tmp_path / "one.safetensors", "ema")


@pytest.mark.parametrize(
    ("loaded", "says"),
    [
        ([np.ones(2)], "holds a list, not a state dict"),
        ({}, "no state dict; it begins with nothing"),
        ({"step": 3, "net": {}}, "no state dict; it begins with 'step', 'net'"),
        ({"ema": {"w": np.ones(2), "lr": 0.1}}, "entry 'lr' is a float"),
        ({"ema": {0: np.ones(2)}}, "entry 0 is a ndarray"),
        ({"params": [np.ones(2)]}, "'params' in the file has weights without their names"),
        ({"ema": [np.ones(2)], "net": [np.ones(2)]}, "weights without their names"),
        ({str(i): {"w": np.ones(2)} for i in range(65)}, "holds more than 64 networks"),
    ],
)
def test_what_holds_no_state_dict_is_refused(loaded, says):
    with pytest.raises(UserError, match=says):
        weights_part.choose(loaded, "", "")


def test_objects_within_themselves_end_and_soon():
    inner = {f"k{i}": 0 for i in range(2000)}
    knot = {f"n{i}": inner for i in range(2000)}
    for i in range(2000):
        knot[f"self{i}"] = knot
    knot["deep"] = [[knot] * 2000]
    started = time.process_time()
    with pytest.raises(UserError, match="no state dict"):
        weights_part.choose(knot, "", "")
    assert time.process_time() - started < 20  # instead of hours


# Kinds of files.


def test_a_suffix_says_nothing(tmp_path):
    for name in ("weights.bin", "weights.SAFETENSORS", "weights.pt", "weights"):
        save_file(weights(), tmp_path / name)
        is_weights(read(tmp_path / name).state)
    for name in ("other.safetensors", "other.ckpt"):
        torch_writer.save(tmp_path / name, weights())
        is_weights(read(tmp_path / name).state)


def tar(name):
    return name.encode().ljust(257, b"\0") + b"ustar\x0000" + bytes(512)


KINDS = {
    b"": "is empty \\(0 bytes\\)",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "Git LFS pointer",
    b"\n <!DOCTYPE html><html>": "web page \\(HTML\\)",
    b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code>": "an XML file",
    b"Entry not found": "a text file that begins with 'Entry not found'",
    b"\x93NUMPY\x01\x00": "a NumPy array",
    b"\x1f\x8b\x08\x00": "compressed with gzip",
    b"7z\xbc\xaf\x27\x1c\x00\x04": "a 7z archive",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    tar("sys_info"): "a tar file, as PyTorch wrote before",
    b"\x00\x01\x02\x03\xff": "neither safetensors nor a file of torch.save",
    struct.pack("<Q", 1000) + b'{"a": ': "a safetensors file cut short",
    b'{"a": 1}': "is JSON, but no index of weights",
    b"[" * 30: "a text file that begins with",
    b"{" * 300: "is cut off or no JSON",
    b"\x80\x02}q\x00.": "is a pickle, but not one of torch.save",
}


@pytest.mark.parametrize(("content", "says"), KINDS.items())
def test_another_kind_of_file_is_said_by_name(tmp_path, content, says):
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    assert re.search(says, refusal(file))


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (("m/data.pkl", "m/constants.pkl", "m/code/a.py"), "a TorchScript archive"),
        (("arr_0.npy",), "NumPy's .npz"),
        (("word/document.xml",), "is a zip, but not one of torch.save"),
    ],
)
def test_other_zips_are_said_by_name(tmp_path, members, says):
    file = tmp_path / "weights.pt"
    with zipfile.ZipFile(file, "w") as archive:
        for name in members:
            archive.writestr(name, b"x")
    assert says in refusal(file)


def fp8(file, kind):
    header = {"w": {"dtype": kind, "shape": [8], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    return file


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_fp8_is_refused_by_name(tmp_path, kind):
    assert f"such as 'w' of type {kind} (fp8)" in refusal(fp8(tmp_path / "w.safetensors", kind))


def torch_pickle(file, *opcodes):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w/data.pkl", b"".join(opcodes))
        archive.writestr("w/data/0", bytes(8))
    return file


def storage(name):
    return b"(X\x07\x00\x00\x00storagec" + name + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQ"


@pytest.mark.parametrize(
    ("opcodes", "named"),
    [
        ((storage(b"torch\nFloat8_e5m2Storage"),), "torch.Float8_e5m2Storage"),
        (
            (
                b"ctorch._utils\n_rebuild_tensor_v3\n(",
                storage(b"torch.storage\nUntypedStorage"),
                b"K\x00K\x08\x85K\x01\x85\x89}ctorch\nfloat8_e4m3fn\ntR",
            ),
            "torch.float8_e4m3fn",
        ),
    ],
)
def test_fp8_of_pytorch_is_refused_by_name(tmp_path, opcodes, named):
    file = torch_pickle(tmp_path / "w.pt", b"\x80\x02", *opcodes, b".")
    assert f"holds tensors of type {named} (fp8" in refusal(file)


def test_bfloat16_is_read(tmp_path):
    save_file({n: a.astype(ml_dtypes.bfloat16) for n, a in weights().items()}, tmp_path / "w")
    is_weights(read(tmp_path / "w").state)


def test_tensors_that_repeat_a_value_are_not_blown_up(tmp_path):
    file = torch_pickle(
        tmp_path / "w.pt",
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(",
        storage(b"torch\nCharStorage"),
        b"K\x00J\xff\xff\xff\x7f\x85K\x00\x85\x89}tRs.",
    )
    assert "expanded from 8 elements; save it with .contiguous()" in refusal(file)


# Sets of files, and folders.


@pytest.fixture
def sharded(tmp_path):
    """The index of a network in two files."""
    names = list(weights())
    places = {n: f"model-0000{i + 1}-of-00002.safetensors" for i, n in enumerate(names)}
    for name, place in places.items():
        save_file({name: weights()[name]}, tmp_path / place)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_a_sharded_set_is_read_whole(sharded):
    is_weights(read(sharded).state)
    is_weights(read(sharded.parent).state)
    assert "one of several files" in refusal(sharded.parent / "model-00001-of-00002.safetensors")


def test_a_sharded_set_of_pytorch_is_read_whole(tmp_path):
    names = list(weights())
    for i, name in enumerate(names):
        torch_writer.save(tmp_path / f"part{i}.bin", {name: weights()[name]})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {n: f"part{i}.bin" for i, n in enumerate(names)}}))
    is_weights(read(index).state)


@pytest.mark.parametrize("place", ["../x", "/etc/passwd", "a/b", "..", ".", "", 3, None, "a\0b"])
def test_an_index_names_files_of_its_own_folder_only(sharded, place):
    sharded.write_text(json.dumps({"weight_map": {"a.weight": place}}))
    assert "is no file beside it" in refusal(sharded)


def test_a_damaged_set_is_refused_by_the_file_that_is_damaged(sharded):
    index = json.loads(sharded.read_text())
    sharded.write_text(json.dumps({"weight_map": index["weight_map"] | {"c": "absent"}}))
    assert "absent: cannot be read" in refusal(sharded)
    sharded.write_text(
        json.dumps({"weight_map": index["weight_map"] | {"c": index["weight_map"]["b"]}})
    )
    assert "its files lack 'c', which it names" in refusal(sharded)
    sharded.write_text(json.dumps({"weight_map": {"b": sharded.name}}))
    assert "is an index itself" in refusal(sharded)
    sharded.write_text(json.dumps({"weight_map": {}}))
    assert "names no file" in refusal(sharded)


def test_a_huge_index_is_not_read(sharded, monkeypatch):
    monkeypatch.setattr(state_dict, "LARGEST_INDEX", 10)
    assert "too large for an index" in refusal(sharded)


def test_a_folder_is_read_from_the_file_of_a_usual_name(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    assert "is a folder, with no weights; name a file" in refusal(folder)
    save_file(weights(), folder / "other.safetensors")
    assert "is a folder, with 'other.safetensors'; name a file" in refusal(folder)
    save_file(weights(), folder / "diffusion_pytorch_model.safetensors")
    is_weights(read(folder).state)
    (tmp_path / "model_index.json").write_text("{}")
    assert "is a pipeline of diffusers" in refusal(tmp_path)
