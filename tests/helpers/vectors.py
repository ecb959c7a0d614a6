"""Golden vectors as tests use them: settings, arrays, weights, and how closely to meet them.

The vectors are channels first, the code channels last; everything is compared in their layout.
"""

import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import GOLDEN
from safetensors.numpy import load_file
from tiers import slow_but

from ig_jax import optim, pytree
from ig_jax.interop import parameter_names
from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.sit import SiT, SiTSettings
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import Objective
from ig_jax.objectives.self_alignment import SelfAlignment
from ig_jax.optim.train_state import trained
from ig_jax.types import NetFn, Params, Process

# SRA's names of distances -> ours.
DISTANCE_OF = {"sml1": "smooth_l1", "l2": "l2", "l1": "l1", "cos": "cosine_tokens"}
EPSILON = float(np.finfo(np.float32).eps)
# A port rounds in another order than the reference does: allow it this many times what float32
# rounding moves the reference itself (the largest met is 6), and never less than this many last
# places. 10 would be blind to an epsilon of 1e-5 for 1e-6 in a norm.
ROUNDINGS, LAST_PLACES = 8, 4


def channels_last(array: np.ndarray) -> jax.Array:
    """[..., c, h, w] -> [..., h, w, c], float32 whatever the vectors hold."""
    return jnp.asarray(np.moveaxis(array, -3, -1), jnp.float32)


def weightless(shape) -> np.ndarray:
    """An array of that shape whose values take no memory."""
    return np.empty(shape, "V0")


def channels_first(array: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(array), -1, -3)


def assert_within(what: str, ours: Any, reference: np.ndarray, bound: float) -> None:
    """Fails unless the shapes agree and every |ours - reference| is at most `bound`."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"{what}: shape {ours.shape}, not {reference.shape}"
    difference = np.max(np.abs(ours - reference), initial=0)
    largest = np.max(np.abs(reference), initial=0)
    # Written so that a NaN fails.
    assert difference <= bound, (
        f"{what}: off by {difference:.3g} of {largest:.3g}, over {bound:.3g}"
    )


def golden_file(folder: Path, name: str) -> Path:
    """A file of a golden directory; skips the test where a directory of --golden lacks it.

    Nothing may be missing in the directory of the tests.
    """
    if not (folder / name).is_file() and folder.resolve() != GOLDEN:
        pytest.skip(f"{folder} holds no {name}")
    return folder / name


def golden_entry(folder: Path, file: str, name: str) -> dict[str, Any]:
    """An entry of a JSON file of a golden directory; skips likewise."""
    entries = json.loads(golden_file(folder, file).read_text())
    if name not in entries and folder.resolve() != GOLDEN:
        pytest.skip(f"{folder / file} has no entry {name}")
    return entries[name]


@dataclass(frozen=True)
class Vectors:
    """One entry of a golden directory."""

    folder: Path
    name: str

    def _json(self, file: str) -> dict[str, Any]:
        return golden_entry(self.folder, file, self.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._json("configs.json")

    @cached_property
    def tolerances(self) -> dict[str, dict[str, float]]:
        return self._json("tolerances.json")

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(golden_file(self.folder, f"{self.name}.npz")) as file:
            return dict(file)

    def __getitem__(self, array: str) -> np.ndarray:
        return self.arrays[array]

    def weights(self, suffix: str = "") -> dict[str, np.ndarray]:
        """Published name -> array."""
        return load_file(golden_file(self.folder, f"{self.name}{suffix}.safetensors"))

    def bound(self, output: str) -> float:
        """How far a correct float32 port may be from the reference."""
        tolerance = self.tolerances[output]
        rounding = ROUNDINGS * tolerance["max_abs_diff"]
        return max(rounding, LAST_PLACES * EPSILON * tolerance["max_abs"])

    def assert_close(self, output: str, ours: Any) -> None:
        """`ours` against the array of that name; integers must be equal."""
        reference = self[output]
        exact = np.issubdtype(reference.dtype, np.integer)
        assert_within(f"{self.name} {output}", ours, reference, 0 if exact else self.bound(output))


def parameters_of(
    metafunc: pytest.Metafunc,
    name: str,
    listed: Callable[[Vectors], Iterable],
    kept: Collection[Any] | None = None,
) -> list[Any]:
    """What a golden directory holds cases for; one case that skips where it lacks the vectors.

    Those that are not `kept` are slow; None keeps all.
    """
    try:
        cases = list(listed(Vectors(metafunc.config.getoption("--golden"), name)))
        return cases if kept is None else slow_but([c for c in cases if c in kept], cases)
    except pytest.skip.Exception as missing:
        return [pytest.param(None, marks=pytest.mark.skip(reason=missing.msg))]


def sit(model: Mapping[str, Any]) -> Network:
    """The published SiT + IG of these constructor arguments."""
    kinds = {"mlp_ratio": model["mlp_ratio"], "qk_norm": model.get("qk_norm", False)}
    settings = SiTSettings(**_common(model), **kinds)
    return Network(SiT, settings, *_data(model))


def dit(model: Mapping[str, Any]) -> Network:
    """The published DiT of these constructor arguments."""
    return replace(sit(model), family=DiT)


def lightningdit(model: Mapping[str, Any]) -> Network:
    """The published LightningDiT + IG of these constructor arguments."""
    settings = LightningDiTSettings(
        **_common(model),
        mlp_ratio=4.0,
        qk_norm=model.get("use_qknorm", False),
        swiglu=model["use_swiglu"],
        rope=model["use_rope"],
        rms_norm=model["use_rmsnorm"],
        shift=not model.get("wo_shift", False),
    )
    return Network(LightningDiT, settings, *_data(model))


def _common(model: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: model[name] for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    kinds = {"time_scale": 1.0, "dtype": "float32", "remat": "none", "unroll": 1}
    readouts = (model["encoder_depth"],) if "encoder_depth" in model else ()
    return {**sizes, **kinds, "readouts": readouts}


def _data(model: Mapping[str, Any]) -> tuple[int, int, int]:
    return model["input_size"], model["in_channels"], model["num_classes"]


@functools.cache
def _shapes(net: Network, with_head: bool) -> Params:
    key = jax.random.key(0)
    head = {"self_alignment": SelfAlignment(1.0, 1, 1).init(key, net)} if with_head else {}
    return jax.eval_shape(lambda: trained(net.init(key), head))


def from_published(net: Network, state: Mapping[str, np.ndarray]) -> Params:
    """A state dict of the reference as our parameters, or anything else under the same names.

    SRA's head becomes that of the term: the tree is then that of all that is trained.
    """
    with_head = any(name.startswith("ap_head.") for name in state)
    like = _shapes(net, with_head)
    return jax.tree.map(jnp.asarray, parameter_names.from_published(state, like))


def objective(
    net: NetFn, process: Process, model: Mapping[str, Any], aux_weight: float
) -> Objective:
    """The published loss of the IG models."""
    return Objective(
        net=net,
        process=process,
        terms={
            "flow": TERMS["flow"](weight=1.0),
            "internal_guidance": TERMS["internal_guidance"](weight=aux_weight),
        },
        label_drop=model["class_dropout_prob"],
        null_class=model["num_classes"],
    )


def adamw_settings(config: Mapping[str, Any]) -> optim.AdamWSettings:
    """The optimizer of a published run."""
    o = config["optimizer"]
    return optim.AdamWSettings(
        learning_rate=o["lr"],
        b1=o["betas"][0],
        b2=o["betas"][1],
        eps=o["eps"],
        weight_decay=o["weight_decay"],
        clip_norm=config["max_grad_norm"],
        warmup_steps=0,
        schedule="constant",
    )


def quick_jit(function: Callable) -> Callable:
    """Compiled in half the time: the programs of the tests run for a moment only."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def assert_trees_within(what: str, ours: Params, reference: Params, bound: float) -> None:
    """`assert_within` for every leaf of the reference, by name."""
    leaves = pytree.flatten(ours)
    for name, leaf in pytree.flatten(reference).items():
        assert_within(f"{what} {name}", leaves[name], leaf, bound)


def assert_gradients_close(v: Vectors, net: Network, case: str, ours: Params) -> None:
    """Every gradient of a case; of its fixed table the reference keeps none."""
    table = np.zeros(ours["pos_embed"].shape, np.float32)
    reference = from_published(net, v.weights(f"_grads_{case}") | {"pos_embed": table})
    compared = {**ours, "pos_embed": reference["pos_embed"]}
    assert_trees_within(f"{case} gradient of", compared, reference, v.bound(f"grads_{case}"))
