"""Files of published networks: reading them, and the names and shapes that they must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax.errors import UserError, shown
from ig_jax.io import state_dict

_SHOWN = 3  # names of each kind that a refusal lists


def read(
    weights: str | None,
    from_published: Callable[[Mapping[str, np.ndarray]], dict[str, Any]],
    *,
    measure: str,
    file: str,
    repository: str,
    place: str,
) -> dict[str, Any]:
    """What `from_published` makes of the state dict in the file that the field `weights` names.

    Args:
      weights: the file, .pth or .safetensors; None: there is none.
      from_published: raises ValueError where names or shapes are others.
      measure, file, repository, place: for the messages: what needs which published file, of which
        repository, and how it is published there.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    path = Path(weights or "")
    if not path.is_file():
        raise UserError(
            f"weights = {shown(weights)}: no such file; {measure} needs {file}, published {place}, "
            f"and nothing is downloaded: put it in weights/ and set weights=weights/{file}"
        )
    try:
        return from_published(state_dict.read(path, "weights").state)
    except ValueError as error:
        raise UserError(
            f"weights = {shown(weights)}: {error}; name {file} of {repository}"
        ) from error


def require(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], network: str
) -> None:
    """Raises ValueError, with the first names of each kind, unless names and shapes are these.

    Args:
      state: what a file holds.
      shapes: name -> shape of all that it must hold.
      network: whose weights are meant, 'of FID's Inception network'.
    """
    wrong = {
        "missing": [name for name in shapes if name not in state],
        "left over": [name for name in state if name not in shapes],
        "of another shape": [
            f"{name} {state[name].shape} for {shape}"
            for name, shape in shapes.items()
            if name in state and state[name].shape != shape
        ],
    }
    problems = [f"{kind}: {_first(names)}" for kind, names in wrong.items() if names]
    if problems:
        raise ValueError(f"these are not the weights {network}; {'; '.join(problems)}")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
