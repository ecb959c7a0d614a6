"""A small file or folder of every kind that is read: how it is made, and what reads it.

Libraries are imported where they are used: most kinds need few of them.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Parts = dict[str, bytes]


class Case(NamedTuple):
    """Files of one kind: what is damaged, how the files are made of it, and what reads them."""

    parts: Callable[[], Parts]
    build: Callable[[Path, Parts], None]
    read: Callable[[Path], Any]


# What is written


def as_files(folder: Path, parts: Parts) -> None:
    for name, content in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _as_zip(name: str, method: int = zipfile.ZIP_STORED) -> Callable[[Path, Parts], None]:
    """Damage is then inside of the zip, whose own checksums are right."""

    def build(folder: Path, parts: Parts) -> None:
        with zipfile.ZipFile(folder / name, "w", method) as archive:
            for member, content in parts.items():
                archive.writestr(member, content)

    return build


def _written(make: Callable[[Path], Any]) -> Parts:
    """What `make` leaves in an empty folder."""
    with tempfile.TemporaryDirectory() as root:
        make(Path(root))
        files = sorted(file for file in Path(root).rglob("*") if file.is_file())
        return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mean, rows = rng.normal(size=4), rng.normal(size=(9, 4))
    pictures = rng.integers(0, 256, (4, 4, 4, 3), np.uint8)
    return {
        **{"mu": mean, "sigma": np.cov(rows, rowvar=False), "arr_0": pictures},
        **{"pool": rows.astype(np.float32), "space": np.array("a1" * 8)},
    }


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _npz(save: Callable[..., None]) -> Callable[[], Parts]:
    return lambda: _written(lambda folder: save(folder / "file.npz", **_arrays()))


def _members() -> Parts:
    return {f"{name}.npy": _npy(array) for name, array in _arrays().items()}


def _pickle(protocol: int, nested: bool) -> Callable[[], Parts]:
    arrays = {name: _arrays()[name] for name in ("mu", "sigma")}
    saved = {"fid": arrays, "kid": {"n": np.float32(3)}} if nested else arrays
    return lambda: {"file.npz": pickle.dumps(saved, protocol)}


def _record() -> bytes:
    from ig_jax.data import provenance

    texts = {"codec": "sd_vae", "autoencoder": "0f" * 32, "crop": "center-crop-dhariwal"}
    numbers = {"image_size": 16, "input_range": (-1.0, 1.0), "examples": 4, "skipped": ("a: b",)}
    about = {"mean": (0.5,) * 4, "std": (1.5,) * 4, "source": {"name": "x"}, "versions": {"a": "1"}}
    return provenance.dumps(provenance.Record(**texts, **numbers, **about)).encode()


def _latents() -> Parts:
    rng = np.random.default_rng(1)
    names = [f"{i % 2:05d}/img-mean-std-{i:08d}.npy" for i in range(4)]
    arrays = {n: _npy(rng.normal(size=(8, 2, 2)).astype(np.float32)) for n in names}
    labels = json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]})
    return {**arrays, "dataset.json": labels.encode(), "ig_jax.json": _record()}


def _zip_of(parts: Callable[[], Parts], name: str) -> Callable[[], Parts]:
    return lambda: _written(lambda folder: _as_zip(name)(folder, parts()))


def _shards() -> Parts:
    from safetensors.numpy import save

    rng = np.random.default_rng(2)

    def shard() -> bytes:
        latents = rng.normal(size=(2, 3, 5, 2, 2)).astype(np.float32)
        arrays = {"latents": latents[0], "latents_flip": latents[1]}
        return save({**arrays, "labels": np.array([0, 1, 2])}, {"total_size": "3"})

    return {f"latents_rank00_shard{i:03d}.safetensors": shard() for i in range(2)}


def _torch_zip() -> Parts:
    from torch_pickles import training_file, write

    return _written(lambda folder: write(folder / "file.pt", training_file(), protocol=4))


def _torch_members() -> Parts:
    with zipfile.ZipFile(io.BytesIO(_torch_zip()["file.pt"])) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _torch_legacy() -> Parts:
    from torch_legacy_pickles import write
    from torch_pickles import training_file

    return _written(lambda folder: write(folder / "file.pt", training_file(), protocol=4))


def _statistics() -> Parts:
    from ig_jax.io.torch import writer as torch_writer

    arrays = {"mean": np.zeros((1, 5, 1, 1)), "std": np.ones((1, 5, 1, 1))}
    return _written(lambda folder: torch_writer.save(folder / "file.pt", arrays))


def _pictures() -> Parts:
    from PIL import Image

    rng = np.random.default_rng(3)
    found = {}
    for i in range(4):
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(content, "PNG")
        found[f"n{i % 2}/{i}.png"] = content.getvalue()
    return found


def _labelled_pictures() -> Parts:
    labels = [[name, i] for i, name in enumerate(_pictures())]
    return {**_pictures(), "dataset.json": json.dumps({"labels": labels}).encode()}


def _tfds(features: Any, examples: list[dict[str, Any]]) -> Parts:
    from ig_jax.data.tfds import format as tfds_format

    def make(folder: Path) -> None:
        name = tfds_format.shard_name("toy", "train", 0, 1)
        tfds_format.write_shard(folder / name, examples, features)
        about = {"name": "toy", "split": "train", "description": "", "num_bytes": 1}
        tfds_format.write_metadata(folder, features=features, shard_lengths=[4], **about)

    return _written(make)


def _array_record() -> Parts:
    from ig_jax.data.tfds import format as tfds_format

    rng = np.random.default_rng(4)
    arrays = rng.normal(size=(4, 8, 2, 2)).astype(np.float32)
    examples = [{"moments": a, "label": i % 3, "file_name": f"{i}"} for i, a in enumerate(arrays)]
    return _tfds(tfds_format.features_of({"moments": (8, 2, 2)}, 3), examples)


def _tfds_pictures() -> Parts:
    from tensorflow_datasets import features

    kinds = {"image": features.Image(), "label": features.ClassLabel(num_classes=3)}
    contents = _pictures().values()
    examples = [{"image": io.BytesIO(c), "label": i % 3} for i, c in enumerate(contents)]
    return _tfds(features.FeaturesDict(kinds), examples)


# What reads it


def _read_all(source: Any) -> None:
    source.record() if hasattr(source, "record") else None
    source.batch(np.arange(len(source)))


def _read_statistics(folder: Path) -> None:
    from ig_jax.metrics import reference_statistics

    reference_statistics.read(folder / "file.npz", "evaluate.reference")


def _read_arrays(folder: Path) -> None:
    from ig_jax.io import npz

    for name in npz.names(folder / "file.npz"):
        np.array(npz.read_array(folder / "file.npz", name))


def _read_npy_folder(folder: Path) -> None:
    from ig_jax.data.sources.npy_folder import NpyFolder

    archive = folder / "latents.zip"
    _read_all(NpyFolder(str(archive if archive.exists() else folder), num_classes=3))


def _read_shards(folder: Path) -> None:
    from ig_jax.data.sources.safetensors_shards import SafetensorsShards

    _read_all(SafetensorsShards(str(folder), num_classes=3))


def _read_torch(folder: Path) -> None:
    from ig_jax.io.torch import file as torch_file
    from ig_jax.io.torch import unpickler

    loaded = torch_file.load(folder / "file.pt")
    repr(loaded)
    for leaf in unpickler.leaves(loaded, sys.maxsize):
        np.array(leaf)


def _read_channels(folder: Path) -> None:
    from ig_jax.codecs.autoencoders import VaVae

    np.array(VaVae(weights="", statistics=str(folder / "file.pt")).statistics_per_channel)


def _read_pictures(folder: Path) -> None:
    from ig_jax.data.sources.image_folder import ImageFolder

    archive = folder / "pictures.zip"
    _read_all(
        ImageFolder(
            str(archive if archive.exists() else folder), size=4, num_classes=4, fewer_classes=True
        )
    )


def _read_array_record(folder: Path) -> None:
    from ig_jax.data.sources.array_record import ArrayRecord

    _read_all(ArrayRecord(str(folder), "train", num_classes=3))


def _read_tfds_pictures(folder: Path) -> None:
    from ig_jax.data.sources.tfds_images import TfdsImages

    _read_all(TfdsImages(str(folder), "train", size=4, num_classes=3))


DEFLATED = zipfile.ZIP_DEFLATED
CASES = {
    "npz": Case(_npz(np.savez), as_files, _read_arrays),
    "npz_compressed": Case(_npz(np.savez_compressed), as_files, _read_arrays),
    "npz_members": Case(_members, _as_zip("file.npz"), _read_statistics),
    "npz_compressed_members": Case(_members, _as_zip("file.npz", DEFLATED), _read_statistics),
    "pickle_2": Case(_pickle(2, nested=True), as_files, _read_statistics),
    "pickle_5": Case(_pickle(5, nested=False), as_files, _read_statistics),
    "npy_folder": Case(_latents, as_files, _read_npy_folder),
    "npy_zip": Case(_zip_of(_latents, "latents.zip"), as_files, _read_npy_folder),
    "npy_zip_members": Case(_latents, _as_zip("latents.zip"), _read_npy_folder),
    "safetensors_shards": Case(_shards, as_files, _read_shards),
    "torch_zip": Case(_torch_zip, as_files, _read_torch),
    "torch_zip_members": Case(_torch_members, _as_zip("file.pt"), _read_torch),
    "torch_legacy": Case(_torch_legacy, as_files, _read_torch),
    "latents_stats": Case(_statistics, as_files, _read_channels),
    "image_folder": Case(_pictures, as_files, _read_pictures),
    "image_folder_labelled": Case(_labelled_pictures, as_files, _read_pictures),
    "image_zip": Case(_zip_of(_labelled_pictures, "pictures.zip"), as_files, _read_pictures),
    "array_record": Case(_array_record, as_files, _read_array_record),
    "tfds_images": Case(_tfds_pictures, as_files, _read_tfds_pictures),
}
