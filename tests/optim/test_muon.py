"""Muon: which leaves it takes, as which matrices, and what its iteration does to them.

The published implementation's own numbers are in test_golden_muon.py.
"""

import dataclasses
import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import cpu_devices
import jax
import jax.numpy as jnp
import lively
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from places import HELPERS, KEYS, ROOT
from tiers import slow_but

from ig_jax import optim, pytree
from ig_jax.checkpoint import compatibility
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.sit import SIZES
from ig_jax.optim import matrix_axes
from ig_jax.optim.muon import newton_schulz, newton_schulz_flops

STEPS = 5

SETTINGS = optim.MuonSettings(
    learning_rate=0.1,
    b1=0.8,
    b2=0.9,
    eps=1e-3,
    weight_decay=0.3,
    clip_norm=1.0,
    warmup_steps=0,
    schedule="constant",
    momentum=0.95,
    ns_steps=STEPS,
    ns_dtype="float32",
)


def settings(**changes) -> optim.MuonSettings:
    return dataclasses.replace(SETTINGS, **changes)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def like(params, seed: int = 0):
    """Random leaves of the same names and shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)


def updates_of(s: optim.MuonSettings, grads, params):
    optimizer = optim.muon(s, 10)
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]


# Which leaves.


def groups(params) -> dict[str, list[str]]:
    """What the optimizer's own state says: matrices have a momentum, AdamW's leaves a mean."""
    state = optim.muon(SETTINGS, 10).init(params)
    held = {
        group: [
            path
            for path, leaf in pytree.flatten(optax.tree.get(state, field)).items()
            if isinstance(leaf, jax.Array)
        ]
        for group, field in (("muon", "momentum"), ("adamw", "mu"))
    }
    rest = set(pytree.flatten(params)) - set(held["muon"]) - set(held["adamw"])
    return {**held, "fixed": sorted(rest)}


def lightningdit() -> Network:
    sit = dataclasses.asdict(dataclasses.replace(lively.SETTINGS, qk_norm=True, readouts=(1,)))
    options = {"swiglu": True, "rope": True, "rms_norm": True, "shift": True}
    return Network(LightningDiT, LightningDiTSettings(**sit, **options), 4, 3, lively.CLASSES)


SIT_NORMS = [f"blocks.attn.{n}_norm.{leaf}" for n in "qk" for leaf in ("scale", "bias")]
RMS_NORMS = [
    f"{n}.scale"
    for n in (
        *["blocks.norm1", "blocks.norm2", "blocks.attn.q_norm", "blocks.attn.k_norm"],
        *["final_layer.norm", "heads.depth_1.norm"],
    )
]


@pytest.mark.parametrize(
    "net, mlp, norms",
    [
        (lively.make(qk_norm=True, readouts=(1,)), ["mlp.fc1", "mlp.fc2"], SIT_NORMS),
        (lightningdit(), ["mlp.w12", "mlp.w3"], RMS_NORMS),
    ],
    ids=["sit", "lightningdit"],
)
def test_matrices_go_to_muon_vectors_to_adamw_the_table_to_neither(net, mlp, norms):
    block = ["attn.qkv", "attn.proj", *mlp, "modulation"]
    linear = [
        *[f"blocks.{name}" for name in block],
        *["t_embedder.fc1", "t_embedder.fc2", "x_embedder.proj"],
        *["heads.depth_1.linear", "heads.depth_1.modulation"],
        *["final_layer.linear", "final_layer.modulation"],
    ]
    found = groups(like(lively.abstract(net)))
    assert sorted(found["muon"]) == sorted(
        [*[f"{name}.kernel" for name in linear], "y_embedder.table.embedding"]
    )
    assert sorted(found["adamw"]) == sorted([*[f"{name}.bias" for name in linear], *norms])
    assert found["fixed"] == ["pos_embed"]


@pytest.mark.parametrize(
    "path, shape, rows, cols, published",
    [
        ("t_embedder.fc1.kernel", (256, 24), 24, 256, (24, 256)),
        ("heads.depth_8.linear.kernel", (24, 16), 16, 24, (16, 24)),
        ("blocks.mlp.w12.kernel", (3, 24, 2, 32), 64, 24, (64, 24)),
        ("blocks.mlp.w3.kernel", (3, 32, 24), 24, 32, (24, 32)),
        ("blocks.attn.qkv.kernel", (3, 24, 3, 2, 12), 72, 24, (72, 24)),
        ("blocks.attn.proj.kernel", (3, 2, 12, 20), 20, 24, (20, 24)),
        ("x_embedder.proj.kernel", (2, 2, 4, 24), 24, 16, (24, 4)),
        ("y_embedder.table.embedding", (11, 24), 11, 24, (11, 24)),
    ],
)
def test_a_leaf_is_the_matrix_that_it_is_published_as(path, shape, rows, cols, published):
    matrix = matrix_axes.matrix_of(path, shape)
    depth = (3,) if path.startswith("blocks.") else ()
    assert (matrix.batch, matrix.rows, matrix.cols) == (depth, rows, cols)
    assert matrix.published == published


@pytest.mark.parametrize(
    "path, shape",
    [
        ("final_layer.norm.scale", (24,)),
        ("blocks.norm1.scale", (3, 24)),
        ("blocks.attn.q_norm.scale", (3, 12)),
        ("blocks.attn.qkv.bias", (3, 3, 2, 12)),
        ("blocks.mlp.w12.bias", (3, 2, 32)),
        ("pos_embed", (1, 16, 24)),
    ],
)
def test_a_stacked_vector_and_a_table_are_no_matrices(path, shape):
    assert matrix_axes.matrix_of(path, shape) is None


@pytest.mark.parametrize(
    "path, shape",
    [
        ("blocks.mlp.fc1.kernel", (24, 48)),
        ("t_embedder.fc1.kernel", (3, 24, 48)),
        ("decoder.conv.kernel", (3, 3, 8, 8)),
        ("blocks.attn.qkv.kernel", (24, 3, 2, 12)),
    ],
)
def test_a_matrix_with_an_unexpected_number_of_axes_is_refused_by_name(path, shape):
    with pytest.raises(ValueError, match=rf"{path} has shape \({shape[0]}, .* add what it is to"):
        matrix_axes.matrix_of(path, shape)


# The iteration.

SHAPES = [(24, 16), (16, 24), (20, 20), (3, 12, 30)]


def singular_values(matrices: jax.Array) -> np.ndarray:
    return np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)


def well_conditioned(*shape: int) -> jax.Array:
    """Random singular vectors, singular values from 0.1 to 1 times 5."""
    u, _, v = np.linalg.svd(np.asarray(normal(*shape), np.float64), full_matrices=False)
    return jnp.asarray((u * np.linspace(0.5, 5, u.shape[-1])) @ v, jnp.float32)


@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_come_near_one_and_their_vectors_stay(shape, dtype):
    matrices = well_conditioned(*shape)
    result = newton_schulz(matrices, STEPS, dtype)
    assert 0.65 < singular_values(result).min() and singular_values(result).max() < 1.25
    u, _, v = np.linalg.svd(np.asarray(matrices, np.float64), full_matrices=False)
    core = u.swapaxes(-1, -2) @ np.asarray(result) @ v.swapaxes(-1, -2)
    off_diagonal = core * (1 - np.eye(core.shape[-1]))
    assert np.abs(off_diagonal).max() < (1e-5 if dtype == "float32" else 0.05)


def test_singular_values_follow_the_quintic_polynomial():
    """Three values far apart; the division by the Frobenius norm included."""
    values = np.array([3.0, 1.0, 0.2])
    u, v = (np.linalg.qr(np.asarray(normal(3, 3, seed=i), np.float64))[0] for i in range(2))
    expected = values / np.linalg.norm(values)
    for steps in (1, 2, 5):
        s = expected.copy()
        for _ in range(steps):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        result = newton_schulz(jnp.asarray((u * values) @ v, jnp.float32), steps, "float32")
        np.testing.assert_allclose(result, (u * s) @ v, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_transpose_of_a_matrix_becomes_the_transpose_of_the_result(dtype):
    matrices = normal(2, 9, 14)
    result = newton_schulz(matrices, STEPS, dtype)
    np.testing.assert_array_equal(newton_schulz(matrices.mT, STEPS, dtype), result.mT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scale_of_a_matrix_does_not_matter(dtype):
    matrix = normal(9, 14)
    result = newton_schulz(matrix, STEPS, dtype)
    for scale in (2.0**-10, 2.0**20):
        scaled = newton_schulz(scale * matrix, STEPS, dtype)
        # What is left is the epsilon beside the smaller norm, and its rounding.
        np.testing.assert_allclose(scaled, result, atol=1e-5 if dtype == "float32" else 0.02)


def test_a_zero_matrix_stays_zero():
    assert not np.any(newton_schulz(jnp.zeros((2, 3, 4)), STEPS, "bfloat16"))


def test_its_flops_are_those_that_xla_counts():
    stack = {"blocks": {"mlp": {"fc1": {"kernel": jnp.zeros((2, 128, 256))}}}}
    matrices = stack["blocks"]["mlp"]["fc1"]["kernel"]
    compiled = jax.jit(newton_schulz, static_argnums=(1, 2)).lower(matrices, STEPS, "float32")
    counted = compiled.compile().cost_analysis()["flops"]
    assert newton_schulz_flops(stack, STEPS) == pytest.approx(counted, rel=0.03)


def test_an_update_of_the_published_xl_costs_what_its_state_dict_adds_up_to():
    shapes = json.loads((KEYS / "ig_sit_xl2.json").read_text())
    expected = 0
    for leaf in shapes.values():
        if len(leaf["shape"]) >= 2 and leaf["kind"] == "param":
            m, n = sorted((leaf["shape"][0], prod(leaf["shape"][1:])))
            expected += STEPS * (4 * m * m * n + 2 * m**3)
    depth, hidden_size, num_heads = SIZES["XL"]
    shape = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
    net = lively.make(32, 4, 1000, **shape, mlp_ratio=4.0, readouts=(8,))
    assert newton_schulz_flops(lively.abstract(net), STEPS) == expected
    assert round(expected / 1e12, 1) == 17.8  # its docstring says so


# The update.


def stack_and_slices() -> tuple[dict, dict[str, dict]]:
    """Leaves of a block, three deep, and every slice as leaves of the same names elsewhere."""
    stack = {
        "attn": {"qkv": {"kernel": normal(3, 8, 3, 2, 4)}, "proj": {"kernel": normal(3, 2, 4, 8)}},
        "mlp": {"fc1": {"kernel": normal(3, 8, 20)}, "fc2": {"kernel": normal(3, 20, 8)}},
    }
    return stack, {f"layer{i}": jax.tree.map(lambda p, i=i: p[i], stack) for i in range(3)}


@pytest.mark.slow
def test_a_stack_moves_as_its_slices_do_one_by_one():
    """To the last bit, operation by operation: fused ones add in an order of their own."""
    stack, slices = stack_and_slices()
    optimizer = optim.muon(settings(clip_norm=0.0), 10)  # clipping would see all slices together

    def update(params):
        return pytree.flatten(optimizer.update(params, optimizer.init(params), params)[0])

    stacked = update({"blocks": stack})
    for i, (name, piece) in enumerate(slices.items()):
        for path, alone in update({name: piece}).items():
            whole = stacked[path.replace(name, "blocks")]
            np.testing.assert_array_equal(whole[i], alone)


def test_weight_decay_is_of_matrices_only_and_not_scaled_by_their_size():
    params = {"a": {"kernel": normal(6, 10), "bias": normal(10)}, "pos_embed": normal(1, 4, 6)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates = updates_of(SETTINGS, zero, params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.03 * params["a"]["kernel"], rtol=1e-6)
    assert not np.any(updates["a"]["bias"])


def test_vectors_decay_by_a_setting_of_their_own_as_in_pytorchs_adamw():
    """p <- (1 - lr decay) p - lr u, where u depends on the gradients alone: against float64."""
    p = normal(10)
    params = {"a": {"kernel": normal(6, 10), "bias": p}, "pos_embed": normal(1, 4, 6)}
    s = settings(vector_weight_decay=0.2, clip_norm=0.0)
    optimizer = optim.muon(s, 10)
    state, bare = optimizer.init(params), optim.muon(settings(clip_norm=0.0), 10).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(bare)
    m, v, expected = np.zeros(10), np.zeros(10), np.asarray(p, np.float64)
    for t in range(1, 4):
        grads = like(params, seed=t)
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grads["a"]["bias"], np.float64)
        m, v = s.b1 * m + (1 - s.b1) * g, s.b2 * v + (1 - s.b2) * g**2
        moved = (m / (1 - s.b1**t)) / (np.sqrt(v / (1 - s.b2**t)) + s.eps)
        expected = (1 - s.learning_rate * 0.2) * expected - s.learning_rate * moved
        np.testing.assert_allclose(params["a"]["bias"], expected, rtol=1e-5, atol=1e-6)


def test_a_run_from_before_vectors_could_decay_goes_on_where_they_do_not():
    def mismatches(new: float, sections: tuple[str, ...]) -> list[str]:
        old = {"optim": {"name": "muon", "weight_decay": 0.01}}
        now = {"optim": {**old["optim"], "vector_weight_decay": new}}
        return compatibility.mismatches(old, now, sections)

    assert mismatches(0.0, compatibility.CONTINUES) == []
    [told] = mismatches(0.1, compatibility.CONTINUES)
    assert told == "optim.vector_weight_decay: 0.0 there, 0.1 here"
    assert (
        mismatches(0.1, compatibility.UPDATES) == []
    )  # it changes the step, not an imported state


def test_the_table_gets_no_update_whatever_its_gradient_and_the_weight_decay():
    params = {"a": {"kernel": normal(6, 10)}, "pos_embed": normal(1, 4, 6)}
    assert not np.any(updates_of(SETTINGS, params, params)["pos_embed"])


def test_clipping_is_by_the_norm_over_both_groups_together_without_the_table():
    """Muon forgets the size of a first gradient, so the vector shows the factor: Adam with a large
    epsilon moves it by nearly lr g / eps."""
    s = settings(eps=1e6, b1=0.0, b2=0.0)
    params = {"a": {"kernel": normal(6, 10), "bias": normal(10)}, "pos_embed": normal(1, 4, 6)}
    grads = {**like(params), "pos_embed": jnp.full((1, 4, 6), 1e6)}
    norm = float(optim.gradient_norm(grads))
    assert norm > s.clip_norm
    expected = -s.learning_rate * grads["a"]["bias"] / norm / s.eps
    np.testing.assert_allclose(updates_of(s, grads, params)["a"]["bias"], expected, rtol=1e-5)


def test_an_update_of_a_matrix_does_not_depend_on_the_schedule_but_by_its_rate():
    params = {"a": {"kernel": normal(6, 10)}}
    peak = updates_of(SETTINGS, params, params)["a"]["kernel"]
    first = updates_of(settings(warmup_steps=4), params, params)["a"]["kernel"]
    np.testing.assert_allclose(first, peak / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("vector_weight_decay", -1.0),
        ("schedule", "step"),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("ns_steps", 0),
        ("ns_dtype", "float16"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value!r}: must "):
        settings(**{field: value})


# Sharing the stack out.


def shared_out() -> dict[str, float]:
    """The update of a stack over four devices; run in a process of its own, which has four."""
    params = {"blocks": {"mlp": {"fc1": {"kernel": normal(4, 24, 16)}}}, "a": {"bias": normal(7)}}
    grads = like(params, seed=1)
    optimizer = optim.muon(SETTINGS, 10)
    mesh = Mesh(np.array(jax.devices()), ("stack",))

    def place(x: jax.Array) -> jax.Array:
        split = PartitionSpec("stack") if x.ndim == 3 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, split))

    split = [jax.tree.map(place, x) for x in (grads, optimizer.init(params), params)]
    compiled = jax.jit(optimizer.update).lower(*split).compile()
    updates = jax.tree.leaves(compiled(*split)[0])
    alone = jax.tree.leaves(updates_of(SETTINGS, grads, params))
    return {
        "devices": mesh.size,
        "difference": max(float(jnp.abs(a - b).max()) for a, b in zip(updates, alone, strict=True)),
        "gathers": compiled.as_text().count("all-gather"),
        "slices_a_device": max(
            u.addressable_shards[0].data.shape[0] for u in updates if u.ndim == 3
        ),
    }


@pytest.mark.slow
def test_over_four_devices_each_iterates_on_its_own_slices_and_all_move_as_on_one():
    flags = {"XLA_FLAGS": cpu_devices.xla_flags(4), "JAX_PLATFORMS": "cpu"}
    path = {"PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, HELPERS, ROOT)))}
    program = "import json, test_muon; print(json.dumps(test_muon.shared_out()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **flags, **path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["devices"], found["gathers"], found["slices_a_device"]) == (4, 0, 1)
    assert found["difference"] < 1e-6
