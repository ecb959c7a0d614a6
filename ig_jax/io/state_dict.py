"""State dicts of published networks from whichever kind of file holds them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - numpy's names of bfloat16, which safetensors asks for
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ig_jax.errors import UserError, shown
from ig_jax.io import files, weights_kind, weights_part
from ig_jax.io.torch import file as torch_file
from ig_jax.io.weights_kind import WeightsKind

# What a folder of weights is read from, the first that it has.
IN_FOLDERS = tuple(
    f"{stem}.{kind}{index}"
    for kind in ("safetensors", "bin")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
    for index in ("", ".index.json")
)
ONE_OF_SEVERAL = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.\w+")
# Element types of safetensors that numpy and ml_dtypes make no sense of here.
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL"}
CHOOSE = {
    "--checkpoint": "say which: --part=NAME",
    "": "save the state dict that is meant to a file of its own",
}

LARGEST_INDEX = 2**26  # bytes; one of a thousand blocks has a few MB
_MOST_SHARED = 4  # times the bytes of a file: some networks share a matrix between layers
ONE_EACH = "a training file has one in 'model' and its average in 'ema'"


class Found(NamedTuple):
    """A state dict, which part of the file it was, what the file says of itself, and remarks."""

    key: str
    state: dict[str, np.ndarray]
    metadata: Mapping[str, str] = {}  # of safetensors
    notes: list[str] = []


class TrainingFile(NamedTuple):
    """A training file: raw and averaged weights, the optimizer's state_dict(), and its steps."""

    model: dict[str, np.ndarray]
    ema: dict[str, np.ndarray]
    opt: Any
    steps: int | None  # None: the file does not say


class _Loaded(NamedTuple):
    content: Any
    size: int  # bytes of all files
    metadata: Mapping[str, str] = {}

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """A tensor may say that it is larger than its storage, by a stride of 0."""
        declared = sum(array.nbytes for array in arrays.values())
        if declared > _MOST_SHARED * self.size:
            raise UserError(
                f"its tensors declare {declared:,} bytes, but {self.size:,} are there: they repeat "
                "their values; save contiguous ones"
            )


def read(file: Path, field: str, part: str = "") -> Found:
    """Reads a state dict; averaged weights are preferred where a file holds several.

    Args:
      file: safetensors or what torch.save wrote, under any suffix; the index of a sharded set of
        either; or a folder with a file of a usual name.
      field: what named the file, for the messages.
      part: which of several networks in the file; '': the averaged one, or the only one.

    Raises:
      UserError: there is no such file, it is of another kind, or it is not clear which is meant.
    """
    loaded = _load(file, field)
    try:
        found = weights_part.choose(loaded.content, part, CHOOSE.get(field, CHOOSE[""]))
        loaded.check(found.arrays)
    except UserError as error:
        raise UserError(f"{field}={file}: {error}") from error
    return Found(found.name or "the file itself", found.arrays, loaded.metadata, found.notes)


def read_safetensors(file: Path) -> Found:
    """All of one safetensors file, as it is.

    Raises:
      UserError: it is absent, damaged, or of another kind.
    """
    if weights_kind.kind_of(file) is not WeightsKind.SAFETENSORS:
        raise UserError(f"{file}: is no safetensors file")
    loaded = _read_one(file, WeightsKind.SAFETENSORS)
    return Found("the file itself", loaded.content, loaded.metadata)


def write_safetensors(
    file: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes contiguous arrays and the metadata of the header, or leaves the old file.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with files.replaced(file) as temporary:
            save_file(dict(arrays), temporary, metadata=dict(metadata))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot be written ({reason}); make room, or name another") from (
            error
        )


def read_training(file: Path, field: str) -> TrainingFile:
    """Reads all that a published training file holds; as views, so that nothing is in memory yet.

    Raises:
      UserError: the file does not exist, or is no training file.
    """
    loaded = _load(file, field)
    held = loaded.content if isinstance(loaded.content, dict) else {}
    present = {key for key in ("model", "ema") if isinstance(held.get(key), dict) and held[key]}
    present |= {"opt"} & set(held)
    lacking = [repr(key) for key in ("model", "ema", "opt") if key not in present]
    if lacking:
        raise UserError(
            f"{field}={file}: holds no {', '.join(lacking)}, so it is no training file; import its "
            "weights alone, without --training_state"
        )
    try:
        model, ema = (weights_part.choose(held[key], "", ONE_EACH) for key in ("model", "ema"))
        loaded.check({**model.arrays, **ema.arrays})
    except UserError as error:
        raise UserError(f"{field}={file}: in its 'model' or 'ema', {error}") from error
    steps = held.get("steps")
    known = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
    return TrainingFile(model.arrays, ema.arrays, held["opt"], steps if known else None)


def _load(file: Path, field: str) -> _Loaded:
    if not os.path.exists(file):
        raise UserError(f"{field}={file}: no such file")
    try:
        file = _in_folder(file) if file.is_dir() else file
        if ONE_OF_SEVERAL.fullmatch(file.name):
            raise UserError(f"{file}: is one of several files of a set; name the set's .index.json")
        kind = weights_kind.kind_of(file)
        return _read_index(file) if kind is WeightsKind.INDEX else _read_one(file, kind)
    except UserError as error:  # which begins with the file
        raise UserError(f"{field}={error}") from error


def _in_folder(folder: Path) -> Path:
    found = next((folder / name for name in IN_FOLDERS if (folder / name).is_file()), None)
    if found:
        return found
    if (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder}: is a pipeline of diffusers; name the folder of one of its parts, such as "
            f"{folder / 'vae'}"
        )
    suffixes = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    held = sorted(path.name for path in folder.iterdir() if path.name.endswith(suffixes))
    listed = ", ".join(map(shown, held[:5])) or "no weights"
    raise UserError(f"{folder}: is a folder, with {listed}; name a file")


def _read_one(file: Path, kind: WeightsKind) -> _Loaded:
    size = file.stat().st_size
    if kind is WeightsKind.TORCH:
        return _Loaded(torch_file.load(file), size)
    try:
        with safe_open(file, framework="np") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            foreign = {name: kind for name, kind in kinds.items() if kind not in _TYPES}
            if foreign:
                name, kind = next(iter(foreign.items()))
                what = "fp8" if kind.startswith("F8") else "not a type of plain weights"
                raise UserError(
                    f"{file}: holds {len(foreign)} tensors such as {shown(name)} of type {kind} "
                    f"({what}); save them as float32, float16 or bfloat16"
                )
            arrays = {name: opened.get_tensor(name) for name in kinds}
            return _Loaded(arrays, size, opened.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{file}: no readable safetensors file ({error})") from error


def _read_index(file: Path) -> _Loaded:
    """All files of a sharded set, as one."""
    if file.stat().st_size > LARGEST_INDEX:
        raise UserError(f"{file}: is JSON or text too large for an index of weights")
    index = files.read_json(file)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise UserError(f"{file}: is JSON, but no index of weights: it has no 'weight_map'")
    if not places:
        raise UserError(f"{file}: is the index of a sharded set, but names no file")
    for name in places.values():
        if not _is_file_name(name):
            raise UserError(
                f"{file}: names {shown(name)}, which is no file beside it; an index names files of "
                "its own folder"
            )
    state: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    size = 0
    for name in sorted(set(places.values())):
        arrays, more, told = _read_shard(file, file.with_name(name))
        twice = next((key for key in arrays if key in state), None)
        if twice is not None:
            raise UserError(f"{file}: two of its files hold {shown(twice)}; copy the set again")
        state |= arrays
        metadata |= told
        size += more
    absent = [name for name in places if name not in state]
    if absent:
        raise UserError(
            f"{file}: its files lack {', '.join(map(shown, absent[:5]))}, which it names"
        )
    return _Loaded(state, size, metadata)


def _is_file_name(name: Any) -> bool:
    """Returns whether it could be a file beside another, and not one elsewhere."""
    if not isinstance(name, str) or "\0" in name or name in ("", ".", ".."):
        return False
    return Path(name).name == name


def _read_shard(index: Path, shard: Path) -> _Loaded:
    try:
        kind = weights_kind.kind_of(shard)
        if kind is WeightsKind.INDEX:
            raise UserError(f"{shard}: is an index itself, not weights")
        loaded = _read_one(shard, kind)
    except UserError as error:
        raise UserError(f"{index}: of its files, {error}") from error
    content = loaded.content
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{index}: of its files, {shard} holds no state dict")
    return loaded
