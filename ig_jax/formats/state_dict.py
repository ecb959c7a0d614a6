"""State dicts of published networks from whichever kind of file holds them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ig_jax.errors import UserError
from ig_jax.formats import torch_file


class Found(NamedTuple):
    """A state dict, and which part of the file it was."""

    key: str
    state: dict[str, np.ndarray]


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
    loaded = torch_file.load(file)
    try:
        found = torch_file.state_dict(loaded)
    except UserError as error:
        raise UserError(f"{field}={file}: {error}") from error
    return Found(found.key or "the file itself", found.arrays)
