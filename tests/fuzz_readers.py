"""Damages small files of every kind that is read, at random, and reads them.

  python tests/fuzz_readers.py --num=2000 --seed=0 [--only=npz]

What may come of a damaged file is a value, or the project's own error in one sentence. Anything
else is a failure: another exception, a warning, memory beyond `ROOM` and `PER_BYTE` of the file's
size, more than `SECONDS`, or the end of the process. So files are read in a child process, and the
next child goes on behind the file that ended the last one. The same seed gives the same damage.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # runnable from anywhere

ROOM, PER_BYTE = 64 << 20, 8  # bytes of memory that reading may take
SECONDS = 60  # a hundred thousand times what it takes
LONGEST = 1000  # characters of an error
SHARE = 512 << 10  # bytes of a thread's stack, in place of 8 MiB

Parts = dict[str, bytes]


class Case(NamedTuple):
    """Files of one kind: what is damaged, how the files are made of it, and what reads them."""

    parts: Callable[[], Parts]
    build: Callable[[Path, Parts], None]
    read: Callable[[Path], Any]


# What is written


def _as_files(folder: Path, parts: Parts) -> None:
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
    pictures = rng.integers(0, 256, (2, 4, 4, 3), np.uint8)
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
    from ig_jax.data import record

    texts = {"codec": "sd_vae", "autoencoder": "0f" * 32, "crop": "center-crop-dhariwal"}
    numbers = {"image_size": 16, "input_range": (-1.0, 1.0), "examples": 4, "skipped": ("a: b",)}
    about = {"mean": (0.5,) * 4, "std": (1.5,) * 4, "source": {"name": "x"}, "versions": {"a": "1"}}
    return record.dumps(record.Record(**texts, **numbers, **about)).encode()


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
    from test_torch_file import training_file, write

    return _written(lambda folder: write(folder / "file.pt", training_file(), protocol=4))


def _torch_members() -> Parts:
    with zipfile.ZipFile(io.BytesIO(_torch_zip()["file.pt"])) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _torch_legacy() -> Parts:
    from test_torch_file import training_file
    from test_torch_legacy import write

    return _written(lambda folder: write(folder / "file.pt", training_file(), protocol=4))


def _statistics() -> Parts:
    from ig_jax.formats import torch_writer

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
    from ig_jax.data import tfds_files

    def make(folder: Path) -> None:
        name = tfds_files.shard_name("toy", "train", 0, 1)
        tfds_files.write_shard(folder / name, examples, features)
        about = {"name": "toy", "split": "train", "description": "", "num_bytes": 1}
        tfds_files.write_metadata(folder, features=features, shard_lengths=[4], **about)

    return _written(make)


def _array_record() -> Parts:
    from ig_jax.data import tfds_files

    rng = np.random.default_rng(4)
    arrays = rng.normal(size=(4, 8, 2, 2)).astype(np.float32)
    examples = [{"moments": a, "label": i % 3, "file_name": f"{i}"} for i, a in enumerate(arrays)]
    return _tfds(tfds_files.features_of({"moments": (8, 2, 2)}, 3), examples)


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
    from ig_jax.metrics import reference

    reference.read(folder / "file.npz", "evaluate.reference")


def _read_arrays(folder: Path) -> None:
    from ig_jax.formats import npz

    for name in npz.names(folder / "file.npz"):
        np.array(npz.array(folder / "file.npz", name))


def _read_npy_folder(folder: Path) -> None:
    from ig_jax.data.npy_folder import NpyFolder

    archive = folder / "latents.zip"
    _read_all(NpyFolder(str(archive if archive.exists() else folder), num_classes=3))


def _read_shards(folder: Path) -> None:
    from ig_jax.data.safetensors_shards import SafetensorsShards

    _read_all(SafetensorsShards(str(folder), num_classes=3))


def _read_torch(folder: Path) -> None:
    from ig_jax.formats import plain_pickle, torch_file

    loaded = torch_file.load(folder / "file.pt")
    repr(loaded)
    for leaf in plain_pickle.leaves(loaded, sys.maxsize):
        np.array(leaf)


def _read_channels(folder: Path) -> None:
    from ig_jax.codecs.autoencoders import VaVae

    np.array(VaVae(weights="", statistics=str(folder / "file.pt")).statistics_per_channel)


def _read_pictures(folder: Path) -> None:
    from ig_jax.data.image_folder import ImageFolder

    archive = folder / "pictures.zip"
    _read_all(ImageFolder(str(archive if archive.exists() else folder), size=4, num_classes=4))


def _read_array_record(folder: Path) -> None:
    from ig_jax.data.array_record import ArrayRecord

    _read_all(ArrayRecord(str(folder), "train", num_classes=3))


def _read_tfds_pictures(folder: Path) -> None:
    from ig_jax.data.tfds_images import TfdsImages

    _read_all(TfdsImages(str(folder), "train", size=4, num_classes=3))


DEFLATED = zipfile.ZIP_DEFLATED
CASES = {
    "npz": Case(_npz(np.savez), _as_files, _read_arrays),
    "npz_compressed": Case(_npz(np.savez_compressed), _as_files, _read_arrays),
    "npz_members": Case(_members, _as_zip("file.npz"), _read_statistics),
    "npz_compressed_members": Case(_members, _as_zip("file.npz", DEFLATED), _read_statistics),
    "pickle_2": Case(_pickle(2, nested=True), _as_files, _read_statistics),
    "pickle_5": Case(_pickle(5, nested=False), _as_files, _read_statistics),
    "npy_folder": Case(_latents, _as_files, _read_npy_folder),
    "npy_zip": Case(_zip_of(_latents, "latents.zip"), _as_files, _read_npy_folder),
    "npy_zip_members": Case(_latents, _as_zip("latents.zip"), _read_npy_folder),
    "safetensors_shards": Case(_shards, _as_files, _read_shards),
    "torch_zip": Case(_torch_zip, _as_files, _read_torch),
    "torch_zip_members": Case(_torch_members, _as_zip("file.pt"), _read_torch),
    "torch_legacy": Case(_torch_legacy, _as_files, _read_torch),
    "latents_stats": Case(_statistics, _as_files, _read_channels),
    "image_folder": Case(_pictures, _as_files, _read_pictures),
    "image_folder_labelled": Case(_labelled_pictures, _as_files, _read_pictures),
    "image_zip": Case(_zip_of(_labelled_pictures, "pictures.zip"), _as_files, _read_pictures),
    "array_record": Case(_array_record, _as_files, _read_array_record),
    "tfds_images": Case(_tfds_pictures, _as_files, _read_tfds_pictures),
}


# Damage

NUMBER = re.compile(rb"\d+")
ODD = [b"-1", b"0", b"1e9", b"4.5", b"99999999999999999999", b"[]", b"null", b"true", b"{}", b'""']


def _damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one to three changes."""
    for _ in range(rng.integers(1, 4)):
        place, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 17))
        noise = rng.integers(0, 256, length, np.uint8).tobytes()
        match rng.integers(8):
            case 0 | 1:
                bits = bytearray(content)
                for at in rng.integers(8 * len(bits), size=rng.integers(1, 9)) if bits else ():
                    bits[at // 8] ^= 1 << (at % 8)
                content = bytes(bits)
            case 2:
                fill = [noise, bytes(length), b"\xff" * length][rng.integers(3)]
                content = content[:place] + fill + content[place + length :]
            case 3:
                content = content[:place]
            case 4:
                content = content[:place] + noise + content[place:]
            case 5:
                content = content[:place] + content[place + length :]
            case 6:
                again = content[place : place + int(rng.integers(1, 200))]
                content = content[:place] + again * int(rng.integers(2, 20)) + content[place:]
            case 7:
                found = list(NUMBER.finditer(content))
                if found:
                    start, end = found[rng.integers(len(found))].span()
                    content = content[:start] + ODD[rng.integers(len(ODD))] + content[end:]
    return content


def _damaged_parts(parts: Parts, name: str, number: int, seed: int) -> Parts:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    chosen = sorted(parts)[rng.integers(len(parts))]
    return {**parts, chosen: _damaged(parts[chosen], rng)}


# The child


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _outcome(case: Case, folder: Path) -> str:
    """What is wrong with how the files in the folder are read; '': nothing."""
    from ig_jax.errors import UserError

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM + PER_BYTE * size, hard))
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.read(folder)
    except UserError as error:
        text = str(error)
        return f"its error is long: {text!r}" if "\n" in text or len(text) > LONGEST else ""
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return ""


def _child(jobs: list[tuple[str, int]], seed: int) -> None:
    """Writes a line of JSON before each job, and one behind it: what was wrong."""
    threading.stack_size(SHARE)
    known: dict[str, Parts] = {}
    for name, number in jobs:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as root:
            if name not in known:
                known[name] = case.parts()
                (Path(root) / "whole").mkdir()
                case.build(Path(root) / "whole", known[name])
                case.read(Path(root) / "whole")  # it imports what is needed
            print(json.dumps({"job": [name, number]}), flush=True)
            folder = Path(root) / "damaged"
            folder.mkdir()
            case.build(folder, _damaged_parts(known[name], name, number, seed))
            print(json.dumps({"wrong": _outcome(case, folder)}), flush=True)


# The parent


def failures(jobs: list[tuple[str, int]], seed: int) -> Iterator[str]:
    """What went wrong, of jobs (case, number), in their order."""
    # More arenas would each take address space, as many as there are threads.
    settings = {"MALLOC_ARENA_MAX": "1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    while jobs:
        command = [sys.executable, __file__, "--child", f"--seed={seed}"]
        child = subprocess.run(
            command,
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            env={**os.environ, **settings},
        )
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        started = [line["job"] for line in lines if "job" in line]
        ended = [line["wrong"] for line in lines if "wrong" in line]
        for (name, number), wrong in zip(started, ended, strict=False):
            if wrong:
                yield f"{name} {number}: {wrong}"
        jobs = jobs[len(started) :]
        if len(started) > len(ended):
            name, number = started[-1]
            yield f"{name} {number}: the process ended with {child.returncode}"
        elif child.returncode:  # before it began to damage files of another kind
            if not jobs:
                raise RuntimeError(child.stderr)
            yield f"{jobs[0][0]}: cannot be made or read whole:\n{child.stderr}"
            jobs = [job for job in jobs if job[0] != jobs[0][0]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=2000, help="of damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CASES, action="append", help="a kind; all by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(json.load(sys.stdin), options.seed)
        return 0
    jobs = [(name, number) for name in options.only or CASES for number in range(options.num)]
    count = 0
    for count, failure in enumerate(failures(jobs, options.seed), 1):  # noqa: B007
        print(failure, flush=True)
    print(f"{len(jobs):,} damaged files, {count:,} failures")
    return bool(count)


if __name__ == "__main__":
    sys.exit(main())
