"""State dicts of published networks from whichever kind of file holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ig_jax.errors import UserError
from ig_jax.formats import torch_file


class Found(NamedTuple):
    """A state dict, and which part of the file it was."""

    key: str
    state: dict[str, np.ndarray]


class Training(NamedTuple):
    """A training file: raw and averaged weights, the optimizer's state_dict(), and its steps."""

    model: dict[str, np.ndarray]
    ema: dict[str, np.ndarray]
    opt: Any
    steps: int | None  # None: the file does not say


def read(file: Path, field: str) -> Found:
    """Reads a .safetensors or a PyTorch file; averaged weights are preferred where it has several.

    Args:
      field: what named the file, for the messages.

    Raises:
      UserError: the file does not exist, or is neither.
    """
    if not file.is_file():
        raise UserError(f"{field}={file}: no such file")
    if file.suffix == ".safetensors":
        try:
            return Found("safetensors", load_file(file))
        except SafetensorError as error:
            raise UserError(f"{field}={file}: no readable safetensors file ({error})") from error
    found = _part(torch_file.load(file), ("ema", "model"), file, field)
    return Found(found.key or "the file itself", found.arrays)


def read_training(file: Path, field: str) -> Training:
    """Reads all that a published training file holds; as views, so that nothing is in memory yet.

    Raises:
      UserError: the file does not exist, or is no training file.
    """
    if not file.is_file():
        raise UserError(f"{field}={file}: no such file")
    loaded = {} if file.suffix == ".safetensors" else torch_file.load(file)
    held = loaded if isinstance(loaded, dict) else {}
    lacking = [repr(key) for key in ("model", "ema", "opt") if key not in held]
    if lacking:
        raise UserError(
            f"{field}={file}: holds no {', '.join(lacking)}, so it is no training file; import its "
            "weights alone, without --training_state"
        )
    model, ema = (_part(loaded, (key,), file, field).arrays for key in ("model", "ema"))
    steps = loaded.get("steps")
    return Training(model, ema, loaded["opt"], None if steps is None else int(steps))


def _part(loaded: Any, prefer: tuple[str, ...], file: Path, field: str) -> torch_file.StateDict:
    try:
        return torch_file.state_dict(loaded, prefer)
    except UserError as error:
        raise UserError(f"{field}={file}: {error}") from error
