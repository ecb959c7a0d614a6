"""Optimizer states as the published trainers write them."""

import json

import numpy as np
from places import KEYS
from torch_pickles import tensor

from ig_jax.interop import parameter_names

UPDATES = 7
ADAMW = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "amsgrad": False}
MATRICES = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "ns_steps": 5, "use_muon": True}
VECTORS = {**ADAMW, "weight_decay": 0.05, "use_muon": False}


def published_order(state: dict, keys: str) -> dict:
    """The state dict in the order of a published one; queries' and keys' norms follow qkv."""
    order = []
    for name in json.loads((KEYS / f"{keys}.json").read_text()):
        order.append(name)
        if name.endswith("attn.qkv.bias"):
            norms = [f"{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")]
            order += [name.replace("qkv.bias", norm) for norm in norms]
    return {name: state[name] for name in order if name in state}


def drawn(state: dict, seed: int, scale: float) -> dict:
    """Arrays of the same names and shapes; tables are nowhere averaged."""
    rng = np.random.default_rng(seed)
    fresh = {n: scale * rng.standard_normal(a.shape) for n, a in state.items()}
    return {
        n: state[n] if n in parameter_names.DERIVED else a.astype(np.float32)
        for n, a in fresh.items()
    }


def squares(state: dict) -> dict:
    return {name: np.square(array) for name, array in state.items()}


def adamw_entry(name: str, first: dict, second: dict, step) -> dict:
    return {"step": step, "exp_avg": tensor(first[name]), "exp_avg_sq": tensor(second[name])}


def adamw_state(state: dict, first: dict, second: dict, group: dict = ADAMW) -> dict:
    """AdamW's state_dict(): parameter 0 is the table, which has no gradient and so no moments."""
    parameters = [name for name in state if "feat_rope" not in name]
    assert parameters[0] == "pos_embed"
    entries = {
        i: adamw_entry(name, first, second, tensor(np.float32(UPDATES)))
        for i, name in enumerate(parameters)
        if name != "pos_embed"
    }
    return {"state": entries, "param_groups": [{**group, "params": list(range(len(parameters)))}]}


def muon_state(state: dict, momentum: dict, first: dict, second: dict) -> dict:
    """The published Muon's state_dict(): matrices by falling shape, then vectors."""
    parameters = [name for name in state if "feat_rope" not in name]
    matrices = [name for name in parameters if state[name].ndim >= 2]
    matrices.sort(key=lambda name: [-size for size in state[name].shape])  # sorting is stable
    vectors = [name for name in parameters if state[name].ndim == 1]
    entries = {
        i: {"momentum_buffer": tensor(momentum[name].reshape(len(momentum[name]), -1))}
        for i, name in enumerate(matrices)
    }
    for i, name in enumerate(vectors, start=len(matrices)):
        entries[i] = adamw_entry(name, first, second, UPDATES)
    numbers = list(range(len(parameters)))
    groups = [
        {**MATRICES, "params": numbers[: len(matrices)]},
        {**VECTORS, "params": numbers[len(matrices) :]},
    ]
    return {"state": entries, "param_groups": groups}


def tensors(state: dict) -> dict:
    return {name: tensor(array) for name, array in state.items()}
