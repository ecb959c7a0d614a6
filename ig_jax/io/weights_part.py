"""The state dict that is meant among all that a file of weights holds, its names unwrapped.

Training tools save several copies of a network side by side (raw, averaged), each under a key of
the file's dict or under a prefix of the names, and wrap the names once more wherever a module is
wrapped: `module.`, `_orig_mod.`, `model.`. What all names begin with is such a wrapper, whatever it
is called, as no network is a single layer. Names that begin differently are copies side by side if
some of their beginnings are words for a whole network (`RAW`, `is_averaged`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from ig_jax.errors import UserError, shown

_Arrays = dict[str, np.ndarray]

# Words for a network as it is trained.
RAW = (
    *("model", "state_dict", "model_state_dict", "net", "network", "module", "weights", "params"),
    *("raw", "_orig_mod", "online_model"),
)
AVERAGED = re.compile(r"ema\w*|shadow|averaged?|avg|swa", re.IGNORECASE)
WORDS = {word for name in RAW for word in name.split("_")} | {"decay", "ckpt", "checkpoint"}
# What lies beside networks in the files of trainers.
ASIDE = re.compile(
    r"opt|optim|\w*optimi[sz]er\w*|\w*scheduler\w*|\w*scaler\w*|rng\w*|random_states?|args|config"
    r"|hparams|hyper_parameters|loops|disc|discriminator|collected_params",
    re.IGNORECASE,
)
# Entries that are no weights: what averaging counts, and what modules add.
BOOKKEEPING = re.compile(
    r"n_averaged|initted|steps?|global_step|epoch|num_updates|decay|min_decay|optimization_step"
    r"|update_after_step|use_ema_warmup|inv_gamma|power|device_indicator|_extra_state|_metadata"
)
# Not among a module's parameters(), which averages without names are of; then, not trained.
BUFFERS = re.compile(r"feat_rope\.\w+|.*running_(mean|var)|.*num_batches_tracked")
FIXED = re.compile(rf"{BUFFERS.pattern}|pos_embed")
_DEEPEST, MOST_PARTS, _LONGEST, _SHOWN = 5, 64, 200, 12


class StateDictPart(NamedTuple):
    """A state dict, which part of the file it is ('': the file itself), and remarks."""

    name: str
    arrays: _Arrays
    notes: list[str]


def is_averaged(name: str) -> bool:
    """Returns whether a word of the name says so: ema, model_ema, ema_0.9999, ..."""
    return any(map(AVERAGED.fullmatch, _words(name)))


def choose(loaded: Any, part: str, ask: str) -> StateDictPart:
    """The state dict that is meant in what a file holds; averaged weights are preferred to raw.

    Args:
      loaded: nested dicts and lists with arrays in them.
      part: the name of the one to take; '': not said.
      ask: how to say which, where several could be meant.

    Raises:
      UserError: there is none, or none of that name, or several could be meant.
    """
    if not isinstance(loaded, dict):
        raise UserError(f"the file holds a {type(loaded).__name__}, not a state dict")
    parts = _Parts()
    parts.collect(loaded, ())
    if not parts.found:
        raise UserError(f"the file holds no state dict; it begins with {_listed(list(loaded)[:5])}")
    name = _named(part, parts.found) if part else _meant(parts.found, ask)
    empty = [] if part or is_averaged(name) else parts.empty
    notes = [f"{empty[0]!r} in the file holds no weights: raw ones are taken"] if empty else []
    arrays = parts.found[name]
    return StateDictPart(name, arrays if isinstance(arrays, dict) else arrays(), notes)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-zA-Z0-9]+", name) if word]


def _listed(names: list[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(map(shown, names[:_SHOWN])) or "nothing") + more


def _named(part: str, found: Mapping[str, Any]) -> str:
    if part in found:
        return part
    if list(found) == [""]:
        raise UserError(f"the file has no parts, so none named {shown(part)}; do not name one")
    raise UserError(f"the file has no part {shown(part)}; it has {_listed(list(found))}")


def _meant(found: Mapping[str, Any], ask: str) -> str:
    averaged = [name for name in found if is_averaged(name)]
    raw = [name for name in found if name not in averaged]
    likely = [name for name in raw if name.split("/")[-1] in RAW]
    candidates = averaged or (likely if len(raw) > 1 else raw)
    if len(candidates) != 1:
        several = _listed(averaged or raw)
        raise UserError(f"the file holds several networks: {several}; {ask}")
    return candidates[0]


class _Parts:
    """All networks in what a file holds, by the names of their places."""

    def __init__(self) -> None:
        # A function raises, or finds the names of averages that have none.
        self.found: dict[str, _Arrays | Callable[[], _Arrays]] = {}
        self.empty: list[str] = []  # places of averages that are none
        # A pickle may hold one dict at many places, or in itself.
        self._seen: set[int] = set()

    def collect(self, value: Any, path: tuple[str, ...]) -> None:
        """Adds the networks in `value`, which lies at `path`."""
        before, name = len(self.found), "/".join(path)
        if isinstance(value, list | dict) and value and id(value) not in self._seen:
            self._seen.add(id(value))  # what is in itself is not looked at again
            if isinstance(value, dict):
                self._collect_dict(value, path)
            elif all(isinstance(entry, np.ndarray) for entry in value):
                self._add(name, lambda: self._of_list(name, value))
            if len(self.found) > before:
                self._seen.remove(id(value))
        nothing = value is None or isinstance(value, list | dict)
        if nothing and len(self.found) == before and path and _is_average(path[-1]):
            self.empty.append(name)

    def _collect_dict(self, value: dict, path: tuple[str, ...]) -> None:
        before = len(self.found)
        for key, inner in value.items() if len(path) < _DEEPEST else ():
            if isinstance(key, str) and not isinstance(inner, np.ndarray) and not _is_aside(key):
                self.collect(inner, (*path, key))
        arrays = any(isinstance(entry, np.ndarray) and entry.size > 1 for entry in value.values())
        if arrays and len(self.found) == before:
            try:
                self._split(_arrays(value), path)
            except UserError as error:  # matters only if this is the part that is taken
                self._add("/".join(path), _raiser(error))

    def _add(self, name: str, arrays: _Arrays | Callable[[], _Arrays]) -> None:
        if len(self.found) == MOST_PARTS:
            raise UserError(f"the file holds more than {MOST_PARTS} networks")
        self.found[name] = arrays

    def _split(self, arrays: _Arrays, path: tuple[str, ...]) -> None:
        """Adds these arrays, or each of the networks that their names say they are."""
        arrays = _unwrapped(arrays)
        groups: dict[str, _Arrays] = {}
        for name, array in arrays.items():
            first, dot, rest = name.partition(".")
            groups.setdefault(first if dot and _is_wrapper(first) else "", {})[name] = array
        others = groups.pop("", {})
        for first, group in groups.items():
            rest = {name.removeprefix(f"{first}."): array for name, array in group.items()}
            self._split_or_add(rest, (*path, first))
        # Beside a whole network there may lie others, such as an autoencoder; averages alone
        # are those of what lies beside them.
        if others and all(map(is_averaged, groups)):
            name = "/".join(path) or ("raw" if groups else "")
            self._add(name, others)

    def _split_or_add(self, arrays: _Arrays, path: tuple[str, ...]) -> None:
        name = "/".join(path)
        if len(path) >= _DEEPEST:
            self._add(name, arrays)
        elif len(arrays) > 1 and not any("." in inner for inner in arrays) and is_averaged(name):
            self._add(name, lambda: self._undotted(name, arrays))
        else:
            self._split(arrays, path)

    def _raw(self, name: str) -> _Arrays:
        """The weights of which those of this name are averages."""
        raw = {n: p for n, p in self.found.items() if isinstance(p, dict) and not is_averaged(n)}
        try:
            return raw[_meant(raw, "")]
        except UserError:
            raise UserError(
                f"{name!r} in the file has weights without their names, and it is not clear whose; "
                "take another part, or save a state dict"
            ) from None

    def _of_list(self, name: str, listed: list[np.ndarray]) -> _Arrays:
        """`parameters()` of a module, in order, under the names of the raw weights."""
        raw = self._raw(name)
        for without in (None, BUFFERS, FIXED):
            names = [n for n in raw if not (without and without.fullmatch(n))]
            if [raw[n].shape for n in names] == [array.shape for array in listed]:
                return raw | dict(zip(names, listed, strict=True))
        raise UserError(
            f"{name!r} in the file has {len(listed)} weights without their names, which are not "
            f"those of the {len(raw)} raw ones; take another part"
        )

    def _undotted(self, name: str, arrays: _Arrays) -> _Arrays:
        """Averages under names whose dots were left out, as latent diffusion saves them."""
        raw = self._raw(name)
        dotted = {n.replace(".", ""): n for n in raw}
        unknown = [n for n in arrays if n not in dotted]
        if unknown:
            raise UserError(f"{name!r} in the file has averages of nothing: {_listed(unknown)}")
        return raw | {dotted[n]: array for n, array in arrays.items()}


def _is_aside(key: str) -> bool:
    known = ASIDE.fullmatch(key) or BOOKKEEPING.fullmatch(key)
    return bool(known) or len(key) > _LONGEST


def _raiser(error: UserError) -> Callable[[], _Arrays]:
    def fail() -> _Arrays:
        raise error

    return fail


def _is_wrapper(first: str) -> bool:
    """Returns whether a first component says 'a network' and nothing else."""
    return first in RAW or _is_average(first)


def _is_average(word: str) -> bool:
    """Returns whether it says 'averaged weights' and nothing else."""
    words = _words(word)
    known = (AVERAGED.fullmatch(word) or word in WORDS or word.isdecimal() for word in words)
    return is_averaged(word) and all(known)


def _arrays(value: dict) -> _Arrays:
    """The entries of a state dict, without those that are no weights."""
    arrays: _Arrays = {}
    for name, entry in value.items():
        if isinstance(name, str) and BOOKKEEPING.fullmatch(name.rpartition(".")[2]):
            if not isinstance(entry, np.ndarray) or entry.size <= 1:
                continue
        if not isinstance(name, str) or not isinstance(entry, np.ndarray):
            kind = type(entry).__name__
            raise UserError(f"entry {shown(name)} is a {kind}; a state dict has names and arrays")
        arrays[name] = entry
    return arrays


def _unwrapped(arrays: _Arrays) -> _Arrays:
    """Without the components that all names begin with."""
    if len(arrays) < 2:
        return arrays
    split = {name: name.split(".") for name in arrays}
    shared = len(commonprefix([parts[:-1] for parts in split.values()]))
    return {".".join(split[name][shared:]): array for name, array in arrays.items()}
