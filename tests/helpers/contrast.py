"""Contrastive self-distillation on made-up tokens: in NumPy's float64, and on many devices.

  python tests/helpers/contrast.py FILE

writes the losses and gradients of several meshes of eight virtual devices into FILE (.npz). A
process of its own, since a test session has two devices.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ig_jax import pytree
from ig_jax.diffusion.flow import Flow
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import NoisedBatch, Teacher
from ig_jax.parallel import collectives
from ig_jax.parallel.mesh import BATCH, make_mesh
from ig_jax.types import NetOutput, OneDevice

B, N, D, H, F = 16, 3, 5, 7, 4
DEPTH, TAU = 2, 0.3
SHAPES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (8, 1, 1), (2, 4, 1)]


def fields(**changes) -> dict:
    return {"weight": 0.1, "depth": DEPTH, "tau": TAU, "hidden_size": H, "features": F, **changes}


def mlp(rng, *widths) -> dict:
    head = {}
    for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
        head[f"fc{i}"] = {"kernel": rng.standard_normal((inputs, outputs))}
        if i < len(widths) - 1:
            scale, bias = 1 + 0.3 * rng.standard_normal((2, outputs))
            head[f"norm{i}"] = {"scale": scale, "bias": bias - 0.8}
    return head


def case(seed: int = 0, rows: int = B) -> dict:
    """Tokens of student and teacher, and heads, float32; no row is like another."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((rows, N, D))
    made = {
        "student": 3 + 2 * (image + 0.4 * rng.standard_normal((rows, N, D))),
        "teacher": image + 0.4 * rng.standard_normal((rows, N, D)) - 1,
        "head": {"projector": mlp(rng, D, H, H, F), "predictor": mlp(rng, F, H, F)},
        "averaged": {"projector": mlp(rng, D, H, H, F)},
    }
    return jax.tree.map(lambda x: np.asarray(x, np.float32), made)


def loss(made: dict, rows=None, **changes):
    """The term's loss of each image, from the tokens of a `case`, or of its part on a device."""
    tokens = jnp.asarray(made["student"])
    x = jnp.zeros((len(tokens), 2, 2, 1))
    teacher = Teacher(
        predict=lambda *inputs: None,
        tokens=lambda *inputs: {DEPTH: jnp.asarray(made["teacher"])},
        head=made["averaged"],
    )
    batch = NoisedBatch(
        **{name: x for name in ("x0", "noise", "x_t", "target", "mirrored")},
        t=jnp.ones(len(x)),
        y=jnp.zeros(len(x), jnp.int32),
        labels=jnp.zeros(len(x), jnp.int32),
        out=NetOutput(pred=x, heads={}, features={DEPTH: tokens}),
        teacher=teacher,
        process=Flow("linear", "uniform"),
        rows=rows or OneDevice(),
    )
    return TERMS["contrastive"](**fields(**changes))(batch, made["head"], x)


# The same in float64, written from the docstring.


def normalized(x: np.ndarray, axis: int, epsilon: float) -> np.ndarray:
    mean, variance = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def through(head: dict, x: np.ndarray, norm: str) -> np.ndarray:
    axis, last = {"batch": 0, "layer": 1}[norm], sum(name.startswith("fc") for name in head)
    for i in range(1, last + 1):
        x = normalized(x @ head[f"fc{i}"]["kernel"], axis, 1e-5)
        if i < last:
            x = np.maximum(x * head[f"norm{i}"]["scale"] + head[f"norm{i}"]["bias"], 0)
    return x


def by_formula(made: dict, norm: str = "batch", tau: float = TAU) -> np.ndarray:
    made = jax.tree.map(lambda x: np.asarray(x, np.float64), made)
    student, teacher = (
        normalized(made[name], 2, 1e-6).mean(axis=1) for name in ("student", "teacher")
    )
    head = made["head"]
    q = unit(through(head["predictor"], through(head["projector"], student, norm), norm))
    k = unit(through(made["averaged"]["projector"], teacher, norm))
    losses = []
    for i in range(len(q)):
        cross_entropies = [
            -np.log(np.exp(own[i] @ others[i] / tau) / np.exp(others @ own[i] / tau).sum())
            for own, others in ((q, k), (k, q))
        ]
        losses.append(2 * tau * np.mean(cross_entropies))
    return np.array(losses)


# On devices.


def on_mesh(made: dict, mesh: Mesh, norm: str = "batch"):
    """Losses [B], and gradients of their mean, as a training step computes them."""
    devices = tuple(axis for axis in BATCH if mesh.shape[axis] > 1)
    parts = mesh.size

    def each(student, teacher, head):
        def own(student, head):
            part = {**made, "student": student, "teacher": teacher, "head": head}
            losses = loss(part, collectives.batch_rows(mesh), norm=norm)
            return jnp.mean(losses), losses

        grads, losses = jax.grad(own, argnums=(0, 1), has_aux=True)(student, head)
        of_head = jax.lax.psum(grads[1], devices) if devices else grads[1]
        return losses, jax.tree.map(lambda g: g / parts, (grads[0], of_head))

    split = PartitionSpec(devices)
    mapped = jax.shard_map(
        each,
        mesh=mesh,
        in_specs=(split, split, PartitionSpec()),
        out_specs=(split, (split, PartitionSpec())),
        check_vma=False,
    )
    losses, (student, head) = jax.jit(mapped)(made["student"], made["teacher"], made["head"])
    return {"losses": losses, **pytree.flatten({"student": student, "head": head})}


def main(file: str) -> None:
    found, made = {}, case()
    for shape in SHAPES:
        mesh = make_mesh(jax.devices()[: int(np.prod(shape))], shape)
        found |= {f"{shape} {name}": x for name, x in on_mesh(made, mesh).items()}
    np.savez(file, **found)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main(*sys.argv[1:])
