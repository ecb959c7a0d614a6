"""Muon with its AdamW group against the published implementation, in float32 and in bfloat16.

The vectors name matrices as PyTorch does; here they are leaves of our names and layouts. float32 is
compared tightly. bfloat16 rounds in another order in every implementation: there, ours may be as
far from the published float32 result as the published bfloat16 is.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import slow_but
from vectors import (
    EPSILON,
    LAST_PLACES,
    ROUNDINGS,
    Vectors,
    assert_within,
    from_published,
    lightningdit,
    quick_jit,
    sit,
)

from ig_jax import optim, pytree
from ig_jax.optim import matrix_axes
from ig_jax.optim.muon import NS_COEFFICIENTS, MuonState, newton_schulz, scale_by_muon

pytestmark = pytest.mark.golden

DTYPES = {"f32": "float32", "bf16": "bfloat16"}
every_dtype = pytest.mark.parametrize("short", DTYPES)


@pytest.fixture(scope="module")
def vectors(golden_dir) -> Vectors:
    return Vectors(golden_dir, "muon")


def settings(vectors: Vectors, short: str) -> optim.MuonSettings:
    muon, adam = vectors.config["muon_group"], vectors.config["adam_group"]
    # One learning rate for both groups: as published, and all we offer.
    assert adam["lr"] == muon["lr"]
    return optim.MuonSettings(
        learning_rate=muon["lr"],
        b1=adam["betas"][0],
        b2=adam["betas"][1],
        eps=adam["eps"],
        weight_decay=muon["weight_decay"],
        vector_weight_decay=adam["weight_decay"],
        clip_norm=0.0,
        warmup_steps=0,
        schedule="constant",
        momentum=muon["momentum"],
        ns_steps=muon["ns_steps"],
        ns_dtype=DTYPES[short],
    )


def bound(vectors: Vectors, short: str, output: str) -> float:
    """How far from the published float32 result an implementation of this type may be."""
    tolerance = vectors.tolerances[output]
    rounding = ROUNDINGS * tolerance["f32_minus_f64_max"]
    kind, name = output.split("__")
    largest = np.max(np.abs(vectors[f"{kind}_f32__{name}"]), initial=0)
    rounding = max(rounding, LAST_PLACES * EPSILON * largest)
    return rounding + (tolerance["bf16_minus_f32_max"] if short == "bf16" else 0)


# Leaves of ours: vectors of two kinds, the table, the convolution, matrices.

ENDS = {1: ("bias", "scale"), 2: ("kernel", "embedding"), 3: ("pos_embed",), 4: ("kernel",)}


def paths(vectors: Vectors) -> dict[str, str]:
    """Name in the vectors -> our dotted name; names that mean the same thing take turns."""
    shapes = vectors.config["muon_params"] | vectors.config["adam_params"]
    parent = {
        name: "x_embedder.proj" if len(shape) == 4 else name for name, shape in shapes.items()
    }
    return {
        name: f"{parent[name]}.{ENDS[len(shape)][i % len(ENDS[len(shape)])]}"
        for i, (name, shape) in enumerate(shapes.items())
    }


def ours(path: str, array: np.ndarray) -> jax.Array:
    """Published layout -> ours."""
    if path.endswith("kernel"):
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return jnp.asarray(array)


def theirs(path: str, leaf: jax.Array) -> np.ndarray:
    """Our layout -> the published one."""
    array = np.asarray(leaf)
    if path.endswith("kernel"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


def gradients(vectors: Vectors, step: int) -> optax.Params:
    """Those of a step; the table's, which has none there, is enormous."""
    grads = {}
    for name, path in paths(vectors).items():
        if f"grad__{name}" in vectors.arrays:
            grads[path] = ours(path, vectors[f"grad__{name}"][step])
        else:
            grads[path] = jnp.full_like(vectors[f"init__{name}"], 1e6)
    return pytree.unflatten(grads)


@pytest.fixture(scope="module")
def runs(vectors) -> dict[str, SimpleNamespace]:
    """Short name of the type -> parameters and momentum after every step, by published name."""

    def run(short: str) -> SimpleNamespace:
        names = paths(vectors)
        steps = vectors.config["steps"]
        optimizer = optim.muon(settings(vectors, short), steps)

        @quick_jit
        def update(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = {path: ours(path, vectors[f"init__{name}"]) for name, path in names.items()}
        params = pytree.unflatten(start)
        state, history = optimizer.init(params), []
        for step in range(steps):
            params, state = update(params, state, gradients(vectors, step))
            history.append((params, optax.tree.get(state, "momentum")))

        def collect(i: int) -> dict[str, np.ndarray]:
            trees = [pytree.flatten(entry[i]) for entry in history]
            return {
                name: np.stack([theirs(path, leaves[path]) for leaves in trees])
                for name, path in names.items()
                if isinstance(trees[0][path], jax.Array)
            }

        return SimpleNamespace(params=collect(0), momentum=collect(1))

    return {short: run(short) for short in DTYPES}


def is_table(vectors: Vectors, name: str) -> bool:
    return vectors[f"init__{name}"].ndim == 3


def published_model(golden_dir, model: str):
    """Network and state dict of a model of the vectors: sit, or a variant of LightningDiT."""
    if model == "sit":
        vectors = Vectors(golden_dir, "sit_forward")
        return sit(vectors.config["model"]), vectors.weights()
    vectors = Vectors(golden_dir, "lightningdit_forward")
    return lightningdit(vectors.config["variants"][model]), vectors.weights(f"_{model}")


@pytest.mark.parametrize("model", slow_but(["base"], ["sit", "base", "qknorm", "all_off"]))
def test_matrices_are_those_of_the_published_state_dict(golden_dir, model):
    """All of two or more dimensions but the tables, flattened to (out, rest), nothing else."""
    net, state = published_model(golden_dir, model)
    params = pytree.flatten(from_published(net, state))
    published = [
        (array.shape[:2], array.reshape(len(array), -1).tobytes())
        for name, array in state.items()
        if array.ndim >= 2 and name != "pos_embed" and "rope" not in name
    ]
    ours = []
    for path, leaf in params.items():
        matrix = matrix_axes.matrix_of(path, leaf.shape)
        if matrix:
            flat = matrix.flatten(leaf)
            np.testing.assert_array_equal(matrix.restore(flat), leaf)
            stack = np.asarray(flat).reshape(-1, matrix.rows, matrix.cols)
            ours += [(matrix.published, array.tobytes()) for array in stack]
    assert sorted(ours) == sorted(published)


def test_coefficients_are_the_published_ones(vectors):
    assert list(NS_COEFFICIENTS) == vectors.config["ns_coefficients"]


@pytest.mark.parametrize("short", slow_but(["f32"], DTYPES))
def test_newton_schulz_is_the_published_one(vectors, short):
    inputs = [name for name in vectors.arrays if name.startswith("ortho_in__")]
    assert inputs
    for name in (name.removeprefix("ortho_in__") for name in inputs):
        if short == "bf16" and name == "rank_deficient":
            continue  # rounding noise in the null space grows to the size of the result
        matrix = jnp.asarray(vectors[f"ortho_in__{name}"])
        steps = vectors.config["muon_group"]["ns_steps"]
        result = newton_schulz(matrix, steps, DTYPES[short])
        reference = vectors[f"ortho_f32__{name}"]
        assert_within(name, result, reference, bound(vectors, short, f"ortho__{name}"))


def test_newton_schulz_rounds_to_the_type_it_is_given(vectors):
    """Without this, computing in float32 throughout would meet every band around it."""
    steps = vectors.config["muon_group"]["ns_steps"]
    for name in vectors.config["muon_params"]:
        if f"ortho_in__{name}" in vectors.arrays:
            matrix = jnp.asarray(vectors[f"ortho_in__{name}"])
            rough, exact = (newton_schulz(matrix, steps, kind) for kind in ("bfloat16", "float32"))
            band = vectors.tolerances[f"ortho__{name}"]["bf16_minus_f32_max"]
            assert np.max(np.abs(rough - exact)) > band / 10


@every_dtype
def test_parameters_after_every_step_are_the_published_ones(vectors, runs, short):
    for name, params in runs[short].params.items():
        if not is_table(vectors, name):
            reference = vectors[f"params_f32__{name}"]
            assert_within(name, params, reference, bound(vectors, short, f"params__{name}"))


@every_dtype
def test_momentum_after_every_step_is_the_published_one(vectors, runs, short):
    names = [name for name in vectors.config["muon_params"] if not is_table(vectors, name)]
    assert sorted(runs[short].momentum) == sorted(names)
    for name, momentum in runs[short].momentum.items():
        reference = vectors[f"momentum__{name}"]
        last_places = LAST_PLACES * EPSILON * np.max(np.abs(reference))
        assert_within(name, momentum.reshape(reference.shape), reference, last_places)


def test_table_stays_where_the_published_weight_decay_shrinks_it(vectors, runs):
    group = vectors.config["muon_group"]
    shrinking = 1 - group["lr"] * group["weight_decay"]
    tables = [name for name in vectors.config["muon_params"] if is_table(vectors, name)]
    assert tables
    for name in tables:
        start = vectors[f"init__{name}"]
        for k, table in enumerate(runs["f32"].params[name], start=1):
            np.testing.assert_array_equal(table, start)
            published = vectors[f"params_f32__{name}"][k - 1]
            np.testing.assert_allclose(published, start * shrinking**k, rtol=1e-6)


def test_one_update_from_a_given_momentum_is_the_published_one(vectors):
    s = settings(vectors, "f32")
    transformation = scale_by_muon(s.momentum, s.ns_steps, s.ns_dtype)
    names = [name for name in vectors.arrays if name.startswith("single_momentum_in__")]
    assert names
    for name in (name.removeprefix("single_momentum_in__") for name in names):
        path, gradient = paths(vectors)[name], vectors[f"grad__{name}"][0]
        before = vectors[f"single_momentum_in__{name}"]
        momentum = ours(path, before.reshape(gradient.shape))
        grads, state = (pytree.unflatten({path: x}) for x in (ours(path, gradient), momentum))
        results = transformation.update(grads, MuonState(state))
        update, after = (
            theirs(path, pytree.flatten(result)[path]).reshape(before.shape)
            for result in (results[0], results[1].momentum)
        )
        reference = vectors[f"single_momentum_out__{name}"]
        last_places = LAST_PLACES * EPSILON * np.max(np.abs(reference))
        assert_within(f"{name} momentum", after, reference, last_places)
        step = vectors[f"single_adjusted_lr__{name}"] * vectors[f"single_update_f32__{name}"]
        # As closely as the parameters that it moves.
        rounding = ROUNDINGS * vectors.tolerances[f"params__{name}"]["f32_minus_f64_max"]
        assert_within(name, s.learning_rate * update, step, rounding)
