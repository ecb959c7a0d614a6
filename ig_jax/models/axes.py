"""Logical axis names of parameters: what each axis of an array counts.

A parameter is named where it is created: `nnx.Param` keeps the names as its metadata `axis_names`,
to which `nnx.vmap` adds that of a stack. How arrays are split over devices and how many FLOPs they
cost follow from the names (`parallel/partitioning.py`, `monitoring/flops.py`).

Flax's own metadata `out_sharding` is left alone: under a mesh Flax takes its names for those of the
mesh's axes, and places every array as it is created.

Kernels are laid out inputs first, then outputs, and one of the two is the width of the residual
stream or of the conditioning vector. Biases carry the names of the outputs they are added to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from ig_jax import pytree

LAYERS = "layers"  # the blocks of a stack
# How `nnx.vmap` names the axis along which it stacks modules.
STACKED = {nnx.PARTITION_NAME: LAYERS, "axis_names": LAYERS}
EMBED = "embed"  # width of the residual stream
CONDITION = "condition"  # width of the conditioning vector
TIME_FEATURES = "time_features"
CLASSES = "classes"
HEADS = "heads"
MLP = "mlp"
WINDOW = ("patch_row", "patch_column")

NAMES = frozenset(
    {
        *(LAYERS, EMBED, CONDITION, TIME_FEATURES, CLASSES, HEADS, MLP, *WINDOW),
        *("qkv", "head_dim", "gate", "modulation", "channels", "patch_values"),
        *("batch", "position", "position_features", "head_features", "scalar"),
    }
)

Axes = Mapping[str, tuple[str, ...]]  # dotted path of a parameter -> names of its axes


def axis_metadata(*names: str) -> dict[str, Any]:
    """Metadata of an `nnx.Param` whose axes have these names.

    Raises:
      ValueError: a name is not in `NAMES`.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} names no axis: add it to NAMES in ig_jax/models/axes.py, or use one "
            f"of {', '.join(sorted(NAMES))}"
        )
    return {"axis_names": names}


def linear_metadata(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Metadata of a linear layer's kernel and bias, as keyword arguments of its constructor."""
    return {
        "kernel_metadata": axis_metadata(*inputs, *outputs),
        "bias_metadata": axis_metadata(*outputs),
    }


def of_module(module: nnx.Module) -> Axes:
    """The axis names of every parameter of a module, which may be abstract.

    Raises:
      ValueError: a parameter has no names, or another number of them than axes.
    """
    found = {}
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        dotted, names = ".".join(map(str, path)), param.get_metadata("axis_names", None)
        shape = param.get_value().shape
        if names is None or len(names) != len(shape):
            raise ValueError(
                f"the parameter {dotted} {list(shape)} has the axis names {names}: name each of "
                "its axes where it is created (ig_jax/models/axes.py)"
            )
        found[dotted] = tuple(names)
    return found


def of_heads(params: Mapping[str, Any]) -> Axes:
    """The axis names of the heads of loss terms: plain trees of kernels, inputs first, and biases.

    The inputs of a kernel are split as the width of the residual stream is.
    """
    return {
        path: (EMBED, *["head_features"] * (len(leaf.shape) - 1))
        if len(leaf.shape) > 1
        else ("head_features",) * len(leaf.shape)
        for path, leaf in pytree.flatten(params).items()
    }


def names_of(axes: Axes, path: str) -> tuple[str, ...] | None:
    """The axis names of the parameter that a leaf belongs to; None where it belongs to none.

    The path of a leaf of an optimizer's state or of an average ends in that of its parameter.
    """
    words = path.split(".")
    ends = (".".join(words[start:]) for start in range(len(words)))
    return next((axes[end] for end in ends if end in axes), None)


def without_layers(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of one block's array."""
    return tuple(name for name in names if name != LAYERS)


def is_matrix(names: tuple[str, ...]) -> bool:
    """Returns whether the array maps one vector space to another; biases and scales do not.

    A label table does: it is the matrix that a one-hot label would be multiplied by.
    """
    names = without_layers(names)
    return len(names) > 1 and (EMBED in names or CONDITION in names)
