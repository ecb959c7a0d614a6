"""Integrity of the files of an orbax checkpoint: none missing, cut short or garbled.

Orbax meets damage only while it reads arrays, on the process that reads them, and reports it in
pages. Here the files alone are looked at, at no cost: JSON is parsed, and a store of arrays (OCDBT)
is followed from its manifest through its index, which both carry checksums, to the ranges of the
files that hold the values. The values themselves have no checksum: a flipped bit among them is
noticed only where they can then not be decompressed, and that when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorstore

from ig_jax.errors import UserError
from ig_jax.io import files

MANIFEST = "manifest.ocdbt"
_NAMES = "_METADATA"  # of the arrays of an item, and in what they are nested
RECORD = "_CHECKPOINT_METADATA"  # of the times when a step was written; nothing here needs it


class Damaged(Exception):
    """A file that cannot be used, and what is wrong with it."""

    def __init__(self, file: Path, fault: str):
        self.file, self.fault = file, fault


def parse(file: Path) -> Any:
    """The value of a JSON file.

    Raises:
      Damaged: it is missing, or no JSON.
    """
    if not file.exists():
        raise Damaged(file, "is missing")
    try:
        return files.read_json(file)
    except UserError:
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
    """Byte ranges of the values below a node of the index.

    Raises:
      Damaged: a node cannot be read.
    """
    file = _held(folder, node)
    try:
        node_dump = tensorstore.ocdbt.dump(store, node=node).result()
    except ValueError:
        raise Damaged(file, "is garbled") from None
    for entry in node_dump["entries"]:
        if node_dump["height"]:
            yield from _ranges(store, folder, entry["location"])
        elif "indirect_value" in entry:  # small values lie in the node itself
            yield entry["indirect_value"]


def _are_names(value: Any) -> bool:
    match value:
        case {"tree_metadata": {**leaves}, **rest}:
            whole = len(leaves) > 0 and all(_is_leaf(leaf) for leaf in leaves.values())
            kinds = (rest.get("use_ocdbt", True), rest.get("use_zarr3", False))
            return whole and kinds[0] is True and isinstance(kinds[1], bool)
    return False


def _is_leaf(value: Any) -> bool:
    match value:
        case {"key_metadata": [*keys], "value_metadata": {"value_type": str(), **rest}}:
            return isinstance(rest.get("skip_deserialize", False), bool) and all(
                isinstance(key, dict)
                and type(key.get("key")) in (str, int)
                and type(key.get("key_type")) is int
                and key["key_type"] > 0
                for key in keys
            )
    return False


def _are_shapes(value: Any) -> bool:
    match value:
        case {"array_metadatas": [*arrays]}:
            return all(_is_shape(array) for array in arrays)
    return False


def _is_shape(value: Any) -> bool:
    match value:
        case {"array_metadata": {"param_name": str(), "write_shape": [*a], "chunk_shape": [*b]}}:
            return all(isinstance(side, int) for side in (*a, *b))
    return False


def has_damaged_record(step: Path) -> bool:
    """Returns whether orbax could not even list a step, because of `RECORD`.

    One that is absent or no JSON does it no harm.
    """
    if not (step / RECORD).is_file():
        return False
    try:
        record = json.loads(files.read_bytes(step / RECORD))
    except (ValueError, UserError):
        return False
    except RecursionError:
        return True
    kinds = {
        "item_handlers": dict | str,
        **dict.fromkeys(("metrics", "performance_metrics", "custom_metadata"), dict),
        **dict.fromkeys(("init_timestamp_nsecs", "commit_timestamp_nsecs"), int),
    }
    return not isinstance(record, dict) or not all(
        record.get(name) is None or isinstance(record[name], kind) for name, kind in kinds.items()
    )


def _follow(folder: Path, *, nested: bool) -> None:
    """`nested`: in other containers than dicts, which only the file of names knows."""
    # Orbax reads other arrays without these files, but not with half of one.
    for file, is_whole in (
        (folder / _NAMES, _are_names),
        *((file, _are_shapes) for file in folder.glob("array_metadatas/*")),
    ):
        if (nested and file.name == _NAMES) or file.exists():
            if not is_whole(parse(file)):
                raise Damaged(file, "is not what was written")
    if not (folder / MANIFEST).exists():
        raise Damaged(folder / MANIFEST, "is missing")
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
    try:
        manifest = tensorstore.ocdbt.dump(store).result()
    except ValueError:
        raise Damaged(folder / MANIFEST, "is cut short or garbled") from None
    for location in _ranges(store, folder, manifest["versions"][-1]["root"]["location"]):
        _held(folder, location)


def require_whole(step: Path, arrays: Iterable[str], nested: Collection[str] = ()) -> None:
    """Raises Damaged unless the named items of a checkpoint's folder are whole.

    `nested`: those of them whose arrays are nested in other containers than dicts.
    """
    for item in arrays:
        _follow(step / item, nested=item in nested)


def is_undecodable(error: Exception) -> bool:
    """Returns whether orbax raised this because bytes that it did find are not what was written."""
    if isinstance(error, LookupError | TypeError | AttributeError | RecursionError):
        return True  # it looked for what is not there
    return type(error) is Exception and "error while reading array index" in str(error)
