"""Sharding: the mesh changes where arrays lie and who computes what, and no result.

What needs eight devices runs in processes of its own (meshes.py); complaints are tested here.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path

import cpu_devices
import jax
import jax.numpy as jnp
import lively
import meshes
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec

from ig_jax import pytree
from ig_jax.config.run_config import ConfigError
from ig_jax.errors import UserError
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.parallel import collectives, partitioning
from ig_jax.parallel.mesh import AXES, make_mesh
from ig_jax.training import step

ONE = (1, 1, 1)
DEPTH = meshes.COMMON["model.depth"]
LIGHT = LightningDiTSettings(
    **dataclasses.asdict(lively.SETTINGS), swiglu=True, rope=True, rms_norm=True, shift=True
)
# What the parameters of a SiT and of a LightningDiT are called, and their axes.
AXES_OF_BOTH = lively.make().axes | Network(LightningDiT, LIGHT, 4, 3, lively.CLASSES).axes
# What sums over devices may move by adding in another order: losses and norms are means of
# thousands of products, a few last places; Adam and Newton-Schulz divide small gradients by
# their own size, so a parameter moves by more, but far below a step's 3e-3.
LOSS, PARAMETER = 2e-6, 2e-5
BFLOAT16 = 2e-3  # of means over many roundings of 2**-9 each


def start(job: str, folder: Path) -> subprocess.Popen:
    environ = os.environ | {
        "XLA_FLAGS": cpu_devices.xla_flags(8),
        "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests/helpers")]),
    }
    command = [sys.executable, meshes.__file__, job, str(folder)]
    return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)


def made(factory: pytest.TempPathFactory, *jobs: str) -> Path:
    """The folder that the jobs wrote, side by side."""
    folder = factory.mktemp("meshes")
    processes = [start(job, folder) for job in jobs]
    try:
        said = [process.communicate(timeout=1800)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(jobs), said
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return made(tmp_path_factory, "sit", "light")


@pytest.fixture(scope="module")
def broad(tmp_path_factory):
    return made(tmp_path_factory, "broad")


def figures(folder: Path, job: str) -> dict:
    return json.loads((folder / f"{job}.json").read_text())


def case(folder: Path, kind: str, shape: meshes.Shape) -> dict[str, np.ndarray]:
    with np.load(folder / f"{meshes.name_of(kind, shape)}.npz") as file:
        return dict(file)


def under(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The leaves of one tree of `meshes.arrays`, by what follows its name."""
    found = {k.removeprefix(name): v for k, v in arrays.items() if re.match(rf"{name}\W", k)}
    assert found
    return found


def assert_same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True, err_msg=name)


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(a[name] - b[name]).sum() for name in b)))


def assert_same_training(got, reference) -> None:
    assert_same_bits(under(got, "initial"), under(reference, "initial"))
    for name in ("loss", "grad_norm"):
        assert got[name].shape == (meshes.STEPS,)
        np.testing.assert_allclose(got[name], reference[name], rtol=LOSS)
    params, expected = under(got, "params"), under(reference, "params")
    assert params.keys() == expected.keys()
    for name in expected:
        assert params[name].dtype == np.float32
        np.testing.assert_allclose(
            params[name], expected[name], rtol=0, atol=PARAMETER, err_msg=name
        )


# The same curve.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shape", "reference"),
    [
        ("sit", (8, 1, 1), "sit"),
        ("sit", (1, 8, 1), "sit"),
        ("parts", (2, 2, 2), "sit"),  # whose batches are cut in two
        ("light", (2, 2, 2), "light"),  # Muon, and a term that reads the averages
    ],
)
def test_eight_devices_train_as_one_does(few, kind, shape, reference):
    assert_same_training(case(few, kind, shape), case(few, reference, ONE))


@pytest.mark.slow
def test_the_losses_compared_are_of_a_network_that_learns(few):
    for kind in ("sit", "light"):
        found = case(few, kind, ONE)
        before, after = under(found, "initial"), under(found, "params")
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        assert moved == {name for name in before if "pos_embed" not in name}
        assert found["loss"][-1] < found["loss"][0]


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    return made(tmp_path_factory, "aligned")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_eight_devices_align_groups_of_tokens_with_a_teacher_as_one_does(aligned, shape):
    assert_same_training(case(aligned, "aligned", shape), case(aligned, "aligned", ONE))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (4, 1, 1), *meshes.SHAPES])
def test_every_mesh_trains_sit_as_one_device_does(few, broad, shape):
    assert_same_training(case(broad, "sit", shape), case(few, "sit", ONE))


@pytest.mark.slow
@pytest.mark.parametrize("shape", meshes.SHAPES)
def test_every_mesh_trains_lightningdit_with_muon_as_one_device_does(broad, shape):
    assert_same_training(case(broad, "light", shape), case(broad, "light", ONE))


@pytest.mark.slow
def test_bfloat16_on_eight_devices_is_that_of_one_but_for_its_rounding(few, broad):
    got, one = (case(broad, "bfloat16", shape) for shape in ((1, 8, 1), ONE))
    assert_same_bits(under(got, "initial"), under(one, "initial"))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(got[name], one[name], rtol=BFLOAT16)
    # One by one, parameters whose gradient is rounding alone move as Adam likes.
    assert distance(under(got, "params"), under(one, "params")) < 0.1 * distance(
        under(one, "params"), under(one, "initial")
    )
    assert {leaf.dtype for leaf in under(got, "params").values()} == {np.dtype("float32")}
    assert not np.array_equal(got["loss"], case(few, "sit", ONE)["loss"])


# Samples.


@pytest.mark.slow
def test_one_and_eight_devices_draw_the_same_samples(few):
    one, eight = (dict(np.load(few / f"samples_sit_{n}.npz")) for n in ("1x1x1", "1x8x1"))
    assert one["euler"].shape == one["dopri5"].shape == (10, 8, 8, 1)
    np.testing.assert_allclose(eight["euler"], one["euler"], rtol=0, atol=1e-5)
    # Rounding decides which steps it takes: then by its tolerances, 1e-5, times many steps.
    np.testing.assert_allclose(eight["dopri5"], one["dopri5"], rtol=0, atol=2e-3)
    assert np.abs(one["euler"][:-1] - one["euler"][1:]).max(axis=(1, 2, 3)).min() > 0.1


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1)])
def test_each_of_eight_devices_holds_an_eighth_of_what_a_step_changes(few, shape):
    """But for vectors and the position table, a hundredth of this small network."""
    share = figures(few, "sit")["figures"][meshes.name_of("sit", shape)]["share"]
    assert share.keys() == {"params", "opt_state", "ema"}
    assert all(1 / 8 < part < 1.12 / 8 for part in share.values()), share


@pytest.mark.slow
def test_each_of_eight_devices_holds_an_eighth_of_the_published_runs(few):
    published = figures(few, "light")["published"]
    assert len(published) == 4
    for name, found in published.items():
        assert found["whole"] > 8e9  # four numbers of 4 bytes for each of 676 million, or three
        assert 1 < 8 * found["each"] / found["whole"] < 1.02, name


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1)])
def test_a_fresh_state_is_made_in_shards(few, shape):
    found = figures(few, "sit")["figures"][meshes.name_of("sit", shape)]
    assert found["made"] < 1.12 * found["bytes"] / 8
    assert found["made_beside"] < 0.03 * found["bytes"]  # a stack of modulations alone is 0.07


# What is sent.

REFERENCE = re.compile(r"(body|condition|to_apply|calls|\w+_computation)=%?([\w.\-]+)")
RESULT = re.compile(r"= \(?\w+\[([\d,]*)\]")


def loops_around(program: str, operation: str) -> Counter:
    """(loops around it, elements of its result) of every such operation of a compiled program."""
    found, references, entry = {}, {}, ""
    for line in program.splitlines():
        if line.endswith("{") and " -> " in line:
            name = line.removeprefix("ENTRY ").split()[0].removeprefix("%")
            entry = name if line.startswith("ENTRY") else entry
            found[name], references[name] = [], []
        elif " = " in line:
            references[name] += [(end, kind == "body") for kind, end in REFERENCE.findall(line)]
            if f" {operation}(" in line:
                sizes = filter(None, RESULT.search(line)[1].split(","))
                found[name].append(prod(map(int, sizes)))
    total, rest = Counter(), [(entry, 0)]
    while rest:
        name, loops = rest.pop()
        total.update((loops, elements) for elements in found[name])
        rest += [(end, loops + is_body) for end, is_body in references[name]]
    return total


def sent(program: str, loops: int, operation: str) -> Counter:
    """Elements of the results of those with so many loops around them."""
    found = loops_around(program, operation)
    return Counter({size: n for (around, size), n in found.items() if around == loops})


def matrices() -> dict[str, int]:
    """Elements of every matrix of one block of the SiT of meshes.py, by name."""
    exp = tiny.experiment({**meshes.SIT, **meshes.COMMON})
    blocks = pytree.flatten(exp.abstract_params["blocks"])
    return {p: prod(x.shape) // DEPTH for p, x in blocks.items() if p.endswith("kernel")}


def compiled(folder: Path, kind: str, shape: meshes.Shape) -> str:
    return (folder / f"{meshes.name_of(kind, shape)}.hlo").read_text()


STEP, BLOCK = 1, 2  # loops around what is done once a step, once a block


def assert_gathers_blocks(program: str) -> None:
    of_block = Counter(matrices().values())
    gathers, scatters = (sent(program, BLOCK, kind) for kind in ("all-gather", "reduce-scatter"))
    assert gathers == of_block + of_block  # forward, and again backward
    assert scatters == Counter(size // 8 for size in of_block.elements())
    outside = sent(program, STEP, "all-gather") + sent(program, 0, "all-gather")
    assert outside and not outside.keys() & {DEPTH * size for size in of_block}


def assert_gathers_once(program: str) -> None:
    stacks = Counter(DEPTH * size for size in matrices().values())
    for operation, parts in (("all-gather", 1), ("reduce-scatter", 8)):
        assert {loops for loops, _ in loops_around(program, operation)} == {STEP}
        # `>=` of Counters: embeddings and heads are among them.
        assert sent(program, STEP, operation) >= Counter(n // parts for n in stacks.elements())


@pytest.mark.slow
def test_fsdp_gathers_a_block_at_a_time_inside_the_loop_and_never_a_stack(few):
    assert_gathers_blocks(compiled(few, "sit", (1, 8, 1)))


@pytest.mark.slow
def test_data_gathers_every_stack_once_a_step_and_nothing_inside_the_loop(few):
    assert_gathers_once(compiled(few, "sit", (8, 1, 1)))


@pytest.mark.slow
def test_optimising_moves_no_gather(broad):
    """The tests above read programs compiled quickly."""
    assert_gathers_blocks(compiled(broad, "optimised", (1, 8, 1)))
    assert_gathers_once(compiled(broad, "optimised", (8, 1, 1)))


@pytest.mark.slow
def test_muon_iterates_on_an_eighth_of_the_stacks_on_each_of_eight_devices(few):
    found = figures(few, "light")["muon"]
    products = found["stacks"] / 8 + found["others"]
    assert 1 < found["each"] / products < 1.1, found  # with what is not a product
    assert found["each"] < (found["stacks"] + found["others"]) / 4
    exchanges = loops_around((few / "muon.hlo").read_text(), "all-to-all")
    assert exchanges.total() == 2 * len(lightningdit_matrices())  # there and back


def lightningdit_matrices() -> list[str]:
    blocks = pytree.flatten(tiny.experiment(meshes.lightningdit()).abstract_params["blocks"])
    return [path for path in blocks if path.endswith("kernel")]


# Going on elsewhere.


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ONE, (1, 2, 1), (2, 4, 1), (8, 1, 1)])
def test_a_state_saved_on_eight_devices_is_restored_bit_for_bit_on_others(few, shape):
    with np.load(few / "moved.npz") as file:
        arrays = dict(file)
    saved = under(arrays, "saved")
    assert {name.split("[")[0].split(".")[1] for name in saved} == set(
        ("step", "params", "opt_state", "ema")
    )
    assert_same_bits(under(arrays, meshes.name_of("on", shape)), saved)


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_with_the_next_batch_as_if_it_had_not_moved(few):
    moved = figures(few, "sit")["moved"]
    assert moved["start"] == 32 * meshes.STEPS  # a batch is of 32
    assert moved["losses"].keys() == {"on_1x1x1", "on_8x1x1", "on_1x8x1"}
    assert moved["losses"]["on_1x8x1"] == moved["unbroken"]
    for losses in moved["losses"].values():
        np.testing.assert_allclose(losses, moved["unbroken"], rtol=LOSS)


# Where leaves lie.


def mesh(*shape: int) -> Mesh:
    """One of any size: nothing is put on it, so that one device may stand for all."""
    return Mesh(np.full(shape, jax.devices()[0]), AXES)


F, T = ("fsdp", "data"), "tensor"


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks.attn.qkv.kernel", (3, 64, 3, 8, 8), (None, F, None, T, None)),
        ("blocks.attn.qkv.bias", (3, 3, 8, 8), (None, None, T, None)),
        ("blocks.attn.proj.kernel", (3, 8, 8, 64), (None, T, None, F)),
        ("blocks.attn.proj.bias", (3, 64), (None, None)),
        ("blocks.mlp.fc1.kernel", (3, 64, 256), (None, F, T)),
        ("blocks.mlp.fc1.bias", (3, 256), (None, T)),
        ("blocks.mlp.fc2.kernel", (3, 256, 64), (None, T, F)),
        ("blocks.mlp.w12.kernel", (3, 64, 2, 256), (None, F, None, T)),
        ("blocks.mlp.w3.kernel", (3, 256, 64), (None, T, F)),
        ("blocks.modulation.kernel", (3, 64, 384), (None, F, None)),
        ("blocks.norm1.scale", (3, 64), (None, None)),
        ("final_layer.linear.kernel", (64, 16), (F, None)),
        ("t_embedder.fc1.kernel", (256, 64), (F, None)),
        ("x_embedder.proj.kernel", (2, 2, 4, 64), (None, None, None, F)),
        ("y_embedder.table.embedding", (11, 64), (None, F)),
        ("pos_embed", (1, 16, 64), (None, None, None)),
        ("step", (), ()),
        ("opt_state.inner_states.trained.0.mu.blocks.attn.qkv.kernel",)
        + ((3, 64, 3, 8, 8), (None, F, None, T, None)),
        ("ema.0.9999.final_layer.linear.kernel", (64, 16), (F, None)),
        ("opt_state.history", (100,), (None,)),
    ],
)
def test_a_leaf_is_split_by_the_end_of_its_name(path, shape, spec):
    placed = partitioning.place(mesh(2, 2, 2), AXES_OF_BOTH, path, shape)
    assert placed.spec(len(shape)) == PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("shape", "length", "over"),
    [
        ((1, 1, 1), 64, ()),
        ((1, 1, 8), 64, ()),
        ((8, 1, 1), 64, ("data",)),
        ((8, 1, 1), 60, ()),
        ((1, 8, 1), 64, ("fsdp",)),
        ((2, 4, 1), 64, ("fsdp", "data")),
        ((2, 4, 1), 60, ("fsdp",)),  # 4 divides it, 8 does not
    ],
)
def test_fsdp_always_splits_and_data_where_it_divides(shape, length, over):
    placed = partitioning.place(
        mesh(*shape), AXES_OF_BOTH, "final_layer.linear.kernel", (length, 16)
    )
    assert (placed.axis, placed.over) == (0 if over else None, over)


def test_every_leaf_of_a_state_is_placed_as_its_parameter_is():
    exp = tiny.experiment({"model.remat": "dots", "mesh": {"data": 1, "fsdp": 2, "tensor": 1}})
    state = exp.abstract_state
    specs = pytree.flatten(jax.tree.map(lambda x: x.sharding.spec, state.params))
    named = jax.tree_util.tree_leaves_with_path((state.opt_state, state.ema))
    of_parameters = 0
    for path, leaf in named:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        parameter = next((p for p in specs if name.endswith(f".{p}") and leaf.ndim), None)
        if parameter:
            of_parameters += 1
            assert leaf.sharding.spec == specs[parameter], name
    trained = len(specs) - 1  # all but the position table, in two moments; two averages
    assert of_parameters == 2 * trained + 2 * len(specs)


# Complaints.


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((2, 2, 1), "mesh: data = 2, fsdp = 2, tensor = 1 cannot be made of 2 devices; .* be 2"),
        ((-1, 3, 1), "mesh: data = -1, fsdp = 3, tensor = 1 cannot be made of 2 devices"),
        ((1, 1, 1), "data = 1, fsdp = 1, tensor = 1 cannot be made of 2 devices"),
        ((-1, -1, 1), "data = -1, fsdp = -1, tensor = 1: only one of them may be -1"),
        ((0, 2, 1), r"mesh\.data = 0: must be at least 1, or -1 for the rest"),
        ((1, 2, 1), r"model\.remat = 'none': .* mesh\.fsdp = 2 .* use dots or full"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_sentence(sizes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        tiny.experiment({"mesh": dict(zip(AXES, sizes, strict=True))})


def test_a_batch_that_does_not_divide_is_told_the_next_that_does():
    asked = {"mesh": {"data": 1, "fsdp": 2, "tensor": 1}, "model.remat": "dots"}
    with pytest.raises(ConfigError, match=r"batch_size = 15: must divide over 2 devices .*: 16"):
        tiny.experiment({**asked, "train.batch_size": 15})


def test_a_leaf_that_the_mesh_does_not_divide_is_named_before_anything_is_made():
    exp = tiny.experiment({"model.num_heads": 1, "mesh": {"data": 1, "fsdp": 1, "tensor": 2}})
    named = r"mesh\.tensor = 2: does not divide axis 1 of .*attn\.proj\.kernel \[2, 1, 16, 16\]"
    with pytest.raises(UserError, match=f"{named}; choose a divisor of 1"):
        step.init_state(exp)
    sentence = r"mesh\.fsdp = 8: does not divide axis 1 of blocks\.modulation\.kernel \[2, 12, 72\]"
    with pytest.raises(UserError, match=f"{sentence}; choose a divisor of 12"):
        partitioning.place(mesh(1, 8, 1), AXES_OF_BOTH, "blocks.modulation.kernel", (2, 12, 72))


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(UserError, match="no rule says .* blocks.attn.gate.weight .* RULES"):
        partitioning.place(mesh(8, 1, 1), AXES_OF_BOTH, "blocks.attn.gate.weight", (2, 16, 16))


def test_a_rule_that_matches_nothing_is_named(monkeypatch):
    exp = tiny.experiment()
    assert partitioning.placements(exp.mesh, exp.axes, exp.abstract_params)
    monkeypatch.setitem(partitioning.RULES, "experts", "tensor")
    with pytest.raises(UserError, match="rule 'experts' .* matches no parameter"):
        partitioning.placements(exp.mesh, exp.axes, exp.abstract_params)


@pytest.mark.slow
def test_a_dry_run_names_the_matrices_that_data_does_not_divide(few):
    """20 channels and eight devices: of the axes to be split only the time MLP's 256 divides."""
    line = next(
        line
        for line in figures(few, "sit")["described"].splitlines()
        if line.startswith("not divisible over data, so whole on each device: ")
    )
    named = line.split(": ")[1].split(", ")
    assert "blocks.attn.qkv.kernel" in named and "t_embedder.fc1.kernel" not in named
    assert not [name for name in named if name.endswith("bias")]


@pytest.mark.slow
def test_weights_converted_once_change_no_bit_of_the_prediction_or_of_the_gradient():
    net = lively.make(dtype="bfloat16", qk_norm=True)
    params = lively.parameters(net)
    gather = collectives.gather(make_mesh(jax.devices()[:1]), net.axes, params, jnp.bfloat16)
    losses = [
        functools.partial(lively.weighted_sum, n)
        for n in (net, dataclasses.replace(net, gather=gather))
    ]
    plain, once = (jax.jit(jax.value_and_grad(loss))(params) for loss in losses)
    jax.tree.map(np.testing.assert_array_equal, plain, once)
    converted = collectives.as_computed(params, jnp.bfloat16)
    types = {path: leaf.dtype for path, leaf in pytree.flatten(converted).items()}
    assert {path for path, dtype in types.items() if dtype == jnp.bfloat16} == {
        path for path in types if path.startswith("blocks.") and path.endswith("kernel")
    }
    assert jax.jit(losses[0])(converted) == plain[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_layout_that_tpus_need_changes_no_gradient(monkeypatch, axis):
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    split = PartitionSpec(*["fsdp" if a == axis else None for a in range(3)])
    rng = np.random.default_rng(axis)
    w, x = rng.normal(size=(2, 4, 6)), rng.normal(size=(6, 2, 4, 6))

    def gradient():
        def loss(w, x):
            whole = collectives._together(w, axis, ("fsdp",), jnp.float32, of_blocks=True)
            return jnp.sum(jnp.sin(x * whole[None]))

        specs = {"in_specs": (split, PartitionSpec("fsdp")), "out_specs": split}
        mapped = jax.shard_map(jax.grad(loss), mesh=mesh, check_vma=False, **specs)
        return jax.jit(mapped)(jnp.float32(w), jnp.float32(x))

    plain = gradient()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_array_equal(gradient(), plain)
    np.testing.assert_allclose(plain, np.sum(x * np.cos(x * w), axis=0), rtol=1e-4, atol=1e-5)
