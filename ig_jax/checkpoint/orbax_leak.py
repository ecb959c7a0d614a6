"""Orbax without the calls that leak memory in every save.

tensorstore (seen in 0.1.72 to 0.1.86) never frees the names in a dict that it makes of JSON: its
`Spec.to_json` and `experimental_collect_matching_metrics` lose about 130 bytes a name. Orbax
(0.12.8) calls the first for each array of each save, to learn what it has just written into the
spec, and the second for each item, to log a rate; 131 arrays lose 0.13 MiB a save. Here both are
answered without tensorstore. `tests/checkpoint/test_checkpoint_leak.py` fails where that no longer
helps.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import tensorstore
from orbax.checkpoint._src.serialization import tensorstore_utils


class _Spec(dict):
    """A spec as the dict that it was made of; all of tensorstore takes such a dict for a spec."""

    def to_json(self) -> dict[str, Any]:
        return dict(self)


class _Tensorstore:
    """The module, but for these two."""

    KvStore = SimpleNamespace(Spec=_Spec, open=tensorstore.KvStore.open)

    @staticmethod
    def experimental_collect_matching_metrics(prefix: str) -> list[dict[str, Any]]:
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorstore, name)


@functools.cache
def stop() -> None:
    """Puts the answers into the one module of orbax that asks; once a process."""
    tensorstore_utils.ts = _Tensorstore()
