"""Checks of a published network's state dict against the names and shapes that it must have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_SHOWN = 3  # names of each kind that a refusal lists


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
