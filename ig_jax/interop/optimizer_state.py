"""The optimizer's state of a published training file, and ours filled with it.

PyTorch numbers the parameters of an optimizer group by group and keeps no names. The published
AdamW has one group, in the order of model.parameters(): that of the state dict, buffers left out.
The published Muon has two: all of two or more dimensions, sorted by shape, the largest first and
equal ones as they came; then the vectors as they came. A moment is laid out like its parameter,
but a momentum is kept as the matrix (out, rest).

The fixed position table has no moments under AdamW; those it has under Muon are dropped, as it is
not trained here. So is what training alone used and no term here trains on: projectors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ig_jax import optim, pytree
from ig_jax.interop import parameter_names
from ig_jax.interop.published_file import TRAINING_ONLY
from ig_jax.optim.muon import MuonState

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")

_Arrays = dict[str, np.ndarray]


class Published(NamedTuple):
    """The optimizer of a training file, its moments under the names of their parameters."""

    settings: dict[str, Any]  # what it says of the config's section `optim`
    updates: int  # that AdamW counted
    # Of `_MOMENTS` -> published name -> array, shaped as its parameter.
    moments: dict[str, _Arrays]


def read(opt: Any, parameters: Mapping[str, np.ndarray], kept: Collection[str] = ()) -> Published:
    """Names what the state_dict() of a published optimizer holds.

    Args:
      opt: {'state': {index: {name: array or number}}, 'param_groups': [...]}.
      parameters: the file's state dict of raw weights, in its order.
      kept: names outside of the network that are trained on, too.

    Raises:
      ValueError: it is neither optimizer, or that of another network; all that differs is listed.
    """
    match opt:
        case {"state": dict(state), "param_groups": [dict(), *_] as groups} if state:
            pass
        case _:
            raise ValueError("'opt' holds no state of an optimizer")
    settings, members = _described(groups, parameters)
    entries, problems = {}, []
    for i, (group, held) in enumerate(zip(groups, members, strict=True)):
        numbers = group.get("params", [])
        if len(numbers) != len(held):
            problems.append(f"group {i} has {len(numbers)} parameters, not {len(held)}")
        numbered = zip(held, numbers, strict=False)
        entries |= {name: state[number] for name, number in numbered if number in state}
    entries = {name: e for name, e in entries.items() if _is_trained(name) or name in kept}
    unknown = sorted({key for entry in entries.values() for key in entry} - {*_MOMENTS, "step"})
    if unknown:
        problems.append(f"it keeps {', '.join(unknown)}, which no optimizer here has")
    updates = sorted({int(entry["step"]) for entry in entries.values() if "step" in entry})
    if len(updates) != 1:
        counts = ", ".join(map(str, updates)) or "none"
        problems.append(f"the numbers of updates should be the same for all, but are {counts}")
    if problems:
        raise ValueError(f"the optimizer does not fit the network: {'; '.join(problems)}")
    return Published(settings, updates[0], _moments(entries, parameters))


def fill(
    optimizer: Published,
    like: optax.OptState,
    lay_out: Callable[[str, _Arrays, dict[str, Any]], dict[str, Any]],
) -> optax.OptState:
    """Our optimizer's state from which its next update is that which PyTorch would have made.

    AdamW goes on counting where it was. A learning rate's schedule starts anew, as the run does.

    Args:
      optimizer: the published one.
      like: our optimizer's state, possibly abstract.
      lay_out: (which of `_MOMENTS`, its published arrays, ours to fill) -> ours.
    """

    def moment(which: str, params: dict[str, Any]) -> dict[str, Any]:
        flat = pytree.flatten(params)
        # Where another part of the optimizer is at work, optax leaves holes.
        held = {p: leaf for p, leaf in flat.items() if not isinstance(leaf, optax.MaskedNode)}
        filled = lay_out(which, optimizer.moments[which], pytree.unflatten(held))
        return pytree.unflatten(flat | pytree.flatten(filled))

    def part(node: Any) -> Any:
        if isinstance(node, MuonState):
            return MuonState(moment("momentum_buffer", node.momentum))
        if isinstance(node, optax.ScaleByAdamState):
            moments = moment("exp_avg", node.mu), moment("exp_avg_sq", node.nu)
            return optax.ScaleByAdamState(jnp.int32(optimizer.updates), *moments)
        return jnp.zeros(node.shape, node.dtype)

    parts = (MuonState, optax.ScaleByAdamState)
    return jax.tree.map(part, like, is_leaf=lambda node: isinstance(node, parts))


def _is_trained(name: str) -> bool:
    """True for what is trained here; the table is called the same there."""
    return not name.startswith(TRAINING_ONLY) and not optim.is_fixed(name)


def _described(
    groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], list[list[str]]]:
    """The settings that the groups hold, and the names of the parameters of each, in its order."""
    ordered = [name for name in parameters if name not in parameter_names.DERIVED]
    try:
        match groups:
            case [{"use_muon": True} as matrices, {"use_muon": False} as vectors]:
                shapes = {n: parameters[n].shape for n in ordered if parameters[n].ndim >= 2}
                largest_first = sorted(shapes, key=shapes.__getitem__, reverse=True)
                return _muon(matrices, vectors), [
                    largest_first,
                    [name for name in ordered if name not in shapes],
                ]
            case [group] if "use_muon" not in group:
                return _adamw(group), [ordered]
    except KeyError as error:
        raise ValueError(
            f"a group of the optimizer lacks {error}, which AdamW's or the published Muon's has"
        ) from error
    raise ValueError(
        f"the optimizer has {len(groups)} groups of parameters: it is neither AdamW with one nor "
        "the published Muon with two"
    )


def _adamw(group: Mapping[str, Any]) -> dict[str, Any]:
    b1, b2 = group["betas"]
    fields = {"learning_rate": "lr", "eps": "eps", "weight_decay": "weight_decay"}
    numbers = {ours: float(group[theirs]) for ours, theirs in fields.items()}
    return {"name": "adamw", "b1": float(b1), "b2": float(b2), **numbers}


def _muon(matrices: Mapping[str, Any], vectors: Mapping[str, Any]) -> dict[str, Any]:
    adamw = _adamw(vectors)
    if adamw["learning_rate"] != matrices["lr"]:
        raise ValueError(
            f"Muon's vectors have learning rate {vectors['lr']}; here they have {matrices['lr']}, "
            "as the matrices"
        )
    return adamw | {
        "name": "muon",
        "weight_decay": float(matrices["weight_decay"]),
        "vector_weight_decay": adamw["weight_decay"],
        "momentum": float(matrices["momentum"]),
        "ns_steps": int(matrices["ns_steps"]),
        "ns_dtype": "bfloat16",  # always, as published
    }


def _moments(
    entries: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, np.ndarray]
) -> dict[str, _Arrays]:
    """Moment -> name -> array; one with a wrong number of values keeps its shape."""

    def shaped(array: Any, like: np.ndarray) -> np.ndarray:
        array = np.asarray(array)
        return array.reshape(like.shape) if array.size == like.size else array

    return {
        which: {
            name: shaped(entry[which], parameters[name])
            for name, entry in entries.items()
            if which in entry
        }
        for which in _MOMENTS
    }
