"""How many images a second each source of training data gives, through the loader.

  python benchmarks/data.py [--examples=4096] [--seconds=5] [--threads=2]

Writes made-up ImageNet-shaped data sets to a temporary folder, reads them once so that they are in
memory, then draws shuffled batches of 256. SiT-XL/2 takes about 600 images/s on an H200.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from PIL import Image

from benchmarks import measuring
from ig_jax.data import latent_writers, loader
from ig_jax.data.sources.array_record import ArrayRecord
from ig_jax.data.sources.image_folder import ImageFolder
from ig_jax.data.sources.npy_folder import ROOT, NpyFolder
from ig_jax.data.sources.safetensors_shards import SafetensorsShards
from ig_jax.types import Source

CLASSES, BATCH, NEEDED = 1000, 256, 600
SHAPES = {"sd_vae": (32, 32, 8), "va_vae": (16, 16, 64)}
PICTURES = 512  # few, for they are slow to write


def write_latents(folder: Path, layout: str, codec: str, examples: int) -> Path:
    rng, shape = np.random.default_rng(0), SHAPES[codec]
    folder.mkdir()
    into = latent_writers.LAYOUTS[layout](
        folder=folder, codec=codec, parts=2, num_classes=CLASSES, shape=shape
    )
    parts = np.array_split(np.arange(examples), 2)
    for number, indices in enumerate(parts):
        names = [f"{i:08d}" for i in indices]
        stored = rng.standard_normal((len(indices), *shape), np.float32)
        into.write(latent_writers.LatentPart(number, indices, names, indices % CLASSES, stored))
    ones = np.ones(shape[-1] // 2)
    lists = [part.tolist() for part in parts]
    into.finish(
        latent_writers.FinishedDataset(
            lists, [[i % CLASSES for i in part] for part in lists], ones, ones
        )
    )
    return folder


def write_zip(folder: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted((folder / ROOT).rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


def write_pictures(folder: Path) -> Path:
    """JPEG files of ImageNet's usual size, smooth as photographs are."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        (folder / f"n{i % 2}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"n{i % 2}/{i:05d}.JPEG")
    return folder


def sources(root: Path, examples: int) -> Iterator[tuple[str, Source]]:
    for codec, what in (("sd_vae", "moments"), ("va_vae", "twins")):
        folder = write_latents(root / f"records-{codec}", "array_record", codec, examples)
        yield f"array_record, {what}", ArrayRecord(str(folder), "train", CLASSES)
    folder = write_latents(root / "npy", "npy_folder", "sd_vae", examples)
    yield "npy_folder, moments", NpyFolder(str(folder), CLASSES)
    file = write_zip(folder, root / "npy.zip")
    yield "npy_folder in a zip, moments", NpyFolder(str(file), CLASSES)
    folder = write_latents(root / "shards", "safetensors_shards", "va_vae", examples)
    yield "safetensors_shards, twins", SafetensorsShards(str(folder), CLASSES)
    yield "image_folder, 256 pixels", ImageFolder(str(write_pictures(root / "pictures")), 256, 2)


def rate(source: Source, seconds: float, threads: int) -> float:
    """Images a second from the loader, when the files are in memory."""
    for start in range(0, len(source), BATCH):
        source.batch(np.arange(start, min(start + BATCH, len(source))))
    batches = loader.batches(source, BATCH, seed=0, threads=threads)
    next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        count += len(next(batches)["label"])
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    flags = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name, source in sources(Path(root), flags.examples):
            found[name] = rate(source, flags.seconds, flags.threads)
    rows = [[name, f"{value:,.0f}", f"{value / NEEDED:.1f}"] for name, value in found.items()]
    given = {"examples": flags.examples, "threads": flags.threads, "images_per_second": found}
    record = {**measuring.machine(jax.devices()), **given}
    measuring.tell(record, [["source", "images/s", f"times {NEEDED}"], *rows], json_file=flags.json)


if __name__ == "__main__":
    main()
