"""Arrays of a published file that import left out or changed, kept beside the run.

With it the export of a network that was not trained on is the published file again, which loads in
the class it came from: with its second half of outputs, its direction of time, its training heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ig_jax.errors import UserError
from ig_jax.interop import parameter_names
from ig_jax.interop.declared import Declared, of_metadata, to_metadata
from ig_jax.interop.detect import Detected, detect
from ig_jax.interop.published_file import LABELS
from ig_jax.io import state_dict

ORIGINAL_FILE = "imported.safetensors"  # in the workdir

_State = Mapping[str, np.ndarray]


class Original(NamedTuple):
    """Arrays of a published file that its network here does not have as they are."""

    arrays: dict[str, np.ndarray]
    declared: Declared  # what the file does not say by itself

    @property
    def has_null_class(self) -> bool:
        return LABELS not in self.arrays  # otherwise a row was added

    def restored(self, state: _State) -> dict[str, np.ndarray] | None:
        """The published file whose network has the state dict `state`; None if it is another's."""
        whole = {**state, **self.arrays}
        try:
            detected = detect(whole, self.declared).state
        except UserError:
            return None
        computed = {n: a for n, a in detected.items() if n not in parameter_names.DERIVED}
        own = {n: a for n, a in state.items() if n not in parameter_names.DERIVED}
        same = computed.keys() == own.keys() and all(
            np.array_equal(array, own[n]) for n, array in computed.items()
        )
        return whole if same else None


def of(state: _State, network: Detected) -> Original:
    """Arrays of a file's `state` that its network does not hold; tables are kept, too."""
    changed = {n: a for n, a in state.items() if network.state.get(n) is not a}
    changed |= {n: state[n] for n in parameter_names.DERIVED if n in state}
    return Original({n: np.array(a, np.float32) for n, a in changed.items()}, network.declared)


def save(workdir: Path, original: Original) -> None:
    metadata = to_metadata(original.declared)
    state_dict.write_safetensors(workdir / ORIGINAL_FILE, original.arrays, metadata)


def read(workdir: Path) -> Original:
    """Reads what `save` wrote.

    Raises:
      UserError: it is not there, or damaged.
    """
    arrays = state_dict.read_safetensors(workdir / ORIGINAL_FILE)
    return Original(arrays.state, of_metadata(arrays.metadata))
