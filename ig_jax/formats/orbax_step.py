"""Whether the files of an orbax checkpoint are whole, or one is missing, cut short or garbled.

Orbax meets damage only while it reads arrays, on the process that reads them, and tells of it in
pages. Here the files alone are looked at, at no cost: JSON is parsed, and a store of arrays (OCDBT)
is followed from its manifest through its index, which both carry checksums, to the ranges of the
files that hold the values. The values themselves have no checksum: a flipped bit among them is
noticed only where they can then not be decompressed, and that when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorstore

MANIFEST = "manifest.ocdbt"


class Damaged(Exception):
    """A file that cannot be used, and what is wrong with it."""

    def __init__(self, file: Path, fault: str):
        self.file, self.fault = file, fault


def _parse(file: Path) -> None:
    try:
        json.loads(file.read_bytes())
    except FileNotFoundError:
        raise Damaged(file, "is missing") from None
    except ValueError:  # of JSON, or of UTF-8
        raise Damaged(file, "is cut short or garbled") from None


def _held(folder: Path, location: str) -> Path:
    """The file that holds a range '<kind>:<folder>:<file>:<offset>:<length>', if it is all there.

    Raises:
      Damaged: the file is missing or ends before.
    """
    _, below, name, offset, length = location.split(":")
    file, end = folder / below / name, int(offset) + int(length)
    if not file.exists():
        raise Damaged(file, "is missing")
    if file.stat().st_size < end:
        raise Damaged(file, f"has only {file.stat().st_size:,} of {end:,} bytes")
    return file


def _ranges(store: tensorstore.KvStore, folder: Path, node: str) -> Iterator[str]:
    """Where the values below a node of the index lie.

    Raises:
      Damaged: a node cannot be read.
    """
    file = _held(folder, node)
    try:
        found = tensorstore.ocdbt.dump(store, node=node).result()
    except ValueError:
        raise Damaged(file, "is garbled") from None
    for entry in found["entries"]:
        if found["height"]:
            yield from _ranges(store, folder, entry["location"])
        elif "indirect_value" in entry:  # small values lie in the node itself
            yield entry["indirect_value"]


def _follow(folder: Path) -> None:
    for file in (folder / "_METADATA", *folder.glob("array_metadatas/*")):
        if file.exists():  # orbax reads arrays without it, but not with half of it
            _parse(file)
    if not (folder / MANIFEST).exists():
        raise Damaged(folder / MANIFEST, "is missing")
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
    try:
        manifest = tensorstore.ocdbt.dump(store).result()
    except ValueError:
        raise Damaged(folder / MANIFEST, "is cut short or garbled") from None
    for location in _ranges(store, folder, manifest["versions"][-1]["root"]["location"]):
        _held(folder, location)


def damage(step: Path, jsons: Iterable[str], arrays: Iterable[str]) -> str:
    """What is wrong with the named items of a checkpoint's folder, in words; '': nothing."""
    try:
        for item in jsons:
            _parse(step / item / "metadata")
        for item in arrays:
            _follow(step / item)
    except Damaged as error:
        return f"{error.file.relative_to(step)} {error.fault}"
    return ""


def is_undecodable(error: Exception) -> bool:
    """Whether orbax raised this because bytes that it did find are not what was written."""
    return type(error) is Exception and "error while reading array index" in str(error)
