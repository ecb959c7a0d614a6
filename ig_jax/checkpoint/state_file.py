"""The state of resumable work in one .npz file, whole or absent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax.errors import UserError
from ig_jax.io import npz
from ig_jax.monitoring import console
from ig_jax.parallel.mesh import to_host


def _named(state: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@dataclass(frozen=True)
class StateFile:
    """A pytree of arrays at `path`, each under its dotted name."""

    path: Path

    def save(self, state: Any) -> None:
        """Waits for the arrays and writes them; after a crash the old file or the new one is there.

        Raises:
          OSError: there is no room.
        """
        npz.write(self.path, {name: np.asarray(x) for name, x in _named(to_host(state)).items()})

    def load(self, like: Any) -> Any | None:
        """The state as numpy arrays in the structure of `like`, whose leaves may be abstract.

        None where no file is there; also where it is damaged or of another state, which is said.
        """
        if not self.path.exists():
            return None
        try:
            arrays = {name: npz.read_array(self.path, name) for name in npz.names(self.path)}
            for name, leaf in _named(like).items():
                found = arrays[name]
                if (found.shape, found.dtype) != (tuple(leaf.shape), np.dtype(leaf.dtype)):
                    raise UserError(f"{self.path}: {name!r} has another shape or dtype")
        except (UserError, KeyError) as fault:
            console.say(f"{self.path}: cannot be gone on from ({fault}); it is made again")
            return None
        # Copies: the file may be replaced while they are in use.
        named = {name: np.array(arrays[name]) for name in _named(like)}
        return jax.tree.unflatten(jax.tree.structure(like), list(named.values()))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
