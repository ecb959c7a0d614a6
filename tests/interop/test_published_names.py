"""Our names and layouts against those of the published state dicts.

`published` goes the other way than the code under test, by rules written out here: a Linear is
(out, in) there, a convolution OIHW, blocks are numbered, and q, k, v are rows in that order.
"""

import json

import jax
import numpy as np
import pytest
from places import KEYS
from safetensors.numpy import load_file
from tiers import slow_but
from vectors import golden_file, weightless

from ig_jax import pytree
from ig_jax.interop import parameter_names
from ig_jax.interop.declared import Declared
from ig_jax.interop.detect import detect
from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.sit import SIZES, SiT, SiTSettings

READOUT = 2


def make(
    depth: int,
    hidden_size: int,
    num_heads: int,
    qk_norm: bool,
    side: int,
    classes: int,
    readouts: tuple[int, ...] = (READOUT,),
    family: type[SiT] = SiT,
):
    settings = SiTSettings(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        patch_size=2,
        mlp_ratio=4.0,
        qk_norm=qk_norm,
        readouts=readouts,
        time_scale=1.0,
        dtype="float32",
        remat="none",
        unroll=1,
    )
    net = Network(family, settings, side, channels=4, num_classes=classes)
    return net.abstract_params


def make_lightningdit(
    depth: int,
    hidden_size: int,
    num_heads: int,
    side: int,
    channels: int,
    classes: int,
    readouts: tuple[int, ...] = (READOUT,),
):
    settings = LightningDiTSettings(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        patch_size=1,
        mlp_ratio=4.0,
        qk_norm=False,
        readouts=readouts,
        time_scale=1.0,
        dtype="float32",
        remat="none",
        unroll=1,
        swiglu=True,
        rope=True,
        rms_norm=True,
        shift=True,
    )
    net = Network(LightningDiT, settings, side, channels=channels, num_classes=classes)
    return net.abstract_params


SMALL = make(depth=3, hidden_size=12, num_heads=3, qk_norm=True, side=4, classes=5)

# Ours -> theirs, applied one after the other to the dotted name.
RENAMED = [
    (f"heads.depth_{READOUT}.", "final_layer_xr."),
    (".norm.scale", ".norm_final.scale"),
    ("t_embedder.fc1", "t_embedder.mlp.0"),
    ("t_embedder.fc2", "t_embedder.mlp.2"),
    ("y_embedder.table.embedding", "y_embedder.embedding_table.weight"),
    ("modulation", "adaLN_modulation.1"),
    (".kernel", ".weight"),
    (".scale", ".weight"),
]


def their_name(ours: str) -> str:
    for mine, theirs in RENAMED:
        ours = ours.replace(mine, theirs)
    return ours


def their_layout(ours: str, array: np.ndarray) -> np.ndarray:
    if ours.startswith("x_embedder.proj.kernel"):
        return array.transpose(3, 2, 0, 1)
    if ours.endswith(("qkv.kernel", "w12.kernel")):
        return array.reshape(len(array), -1).T
    if ours.endswith("attn.proj.kernel"):
        return array.reshape(-1, array.shape[-1]).T
    if ours.endswith("kernel"):
        return array.T
    return array.reshape(-1) if ours.endswith("bias") else array


def published(params) -> dict[str, np.ndarray]:
    state = {}
    for path, leaf in pytree.flatten(params).items():
        if not path.startswith("blocks."):
            state[their_name(path)] = their_layout(path, leaf)
            continue
        name = path.removeprefix("blocks.")
        for i, one in enumerate(leaf):
            state[f"blocks.{i}.{their_name(name)}"] = their_layout(name, one)
    return state


def random_like(abstract):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract)


def shapes(params) -> dict:
    """The nested dict with shapes for leaves."""
    return jax.tree.map(lambda leaf: leaf.shape, params)


@pytest.fixture
def state():
    return published(random_like(SMALL))


def test_a_published_state_dict_becomes_our_parameters_value_by_value(state):
    expected, params = (
        pytree.flatten(random_like(SMALL)),
        parameter_names.from_published(state, SMALL),
    )
    assert shapes(params) == shapes(SMALL)
    for path, leaf in pytree.flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


# file -> what must be told of it, and the network that it is.
FILES = {
    "sit_official_xl2": ({"family": "sit"}, SiT, ()),
    "dit_official_xl2": ({"family": "dit"}, DiT, ()),
    "ig_sit_xl2": ({"readout_depth": READOUT}, SiT, (READOUT,)),
    "ig_sit_b2": ({"readout_depth": READOUT}, SiT, (READOUT,)),
    "sra_sit_xl2": ({}, SiT, ()),
    "sra_dit_xl2": ({}, DiT, ()),
    "lightningdit_official_xl1": ({}, LightningDiT, ()),
    "ig_lightningdit_xl1": ({"readout_depth": READOUT}, LightningDiT, (READOUT,)),
}


def full_size(file: str, depth: int = 0):
    """Parameters of the network, with so many blocks of it; 0: all."""
    _, network, readouts = FILES[file]
    all_blocks, *widths = SIZES["B" if file.endswith("b2") else "XL"]
    sizes, common = (depth or all_blocks, *widths), {"classes": 1000, "readouts": readouts}
    if network is LightningDiT:
        return make_lightningdit(*sizes, side=16, channels=32, **common)
    return make(*sizes, qk_norm=False, side=32, family=network, **common)


def entry_shapes(file: str) -> dict[str, tuple[int, ...]]:
    entries = json.loads((KEYS / f"{file}.json").read_text())
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def kept_shapes(file: str) -> dict[str, tuple[int, ...]]:
    """Of what import takes over: no rotary tables, no head of SRA, no sigma of the official SiT."""
    left_out = ("feat_rope.", "ap_head.")
    kept = {n: s for n, s in entry_shapes(file).items() if not n.startswith(left_out)}
    if file == "sit_official_xl2":
        kept |= {"final_layer.linear.weight": (16, 1152), "final_layer.linear.bias": (16,)}
    return kept


def test_every_list_of_names_is_tried():
    others = {"sdvae_diffusers", "vavae_f16d32"}  # autoencoders
    assert {path.stem for path in KEYS.glob("*.json")} - others == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_full_size_models_have_exactly_the_published_names_and_shapes(file):
    # Blocks weigh nothing; import looks into the few others.
    state = {
        name: weightless(s) if name.startswith("blocks.") else np.zeros(s, np.float32)
        for name, s in entry_shapes(file).items()
    }
    if parameter_names.DERIVED[0] in state:
        state |= parameter_names.rotary_tables(16, 72)
    told, expected = FILES[file][0], kept_shapes(file)
    kept = detect(state, Declared(**told)).state
    assert {n: a.shape for n, a in kept.items() if not n.startswith("feat_rope.")} == expected
    empty = jax.tree.map(lambda leaf: weightless(leaf.shape), full_size(file))
    for back in (published(empty), parameter_names.to_published(empty)):
        assert {name: array.shape for name, array in back.items()} == expected


@pytest.mark.parametrize("file", slow_but(["ig_sit_b2", "ig_lightningdit_xl1"], FILES))
def test_published_names_fill_the_parameters_of_blocks_of_full_width(file):
    # Not all of them: numpy stacks even arrays without a byte value by value.
    depth = READOUT + 1
    beyond = tuple(f"blocks.{i}." for i in range(depth, 28))
    theirs = {n: s for n, s in kept_shapes(file).items() if not n.startswith(beyond)}
    ours = full_size(file, depth)
    filled = parameter_names.from_published({n: weightless(s) for n, s in theirs.items()}, ours)
    assert shapes(filled) == shapes(ours)


def test_a_gated_mlp_becomes_ours_value_by_value():
    small = make_lightningdit(3, 16, 2, side=4, channels=4, classes=5)
    expected = pytree.flatten(random_like(small))
    params = parameter_names.from_published(published(random_like(small)), small)
    for path, leaf in pytree.flatten(params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc1.weight", "final_layer_xr.linear.bias"])
def test_a_missing_name_is_told(state, name):
    del state[name]
    with pytest.raises(ValueError, match=f"the state dict lacks '{name}'"):
        parameter_names.from_published(state, SMALL)


def test_names_left_over_are_told_together(state):
    state |= {"blocks.3.attn.qkv.bias": np.zeros(3), "final_layer_extra.weight": np.zeros(3)}
    with pytest.raises(ValueError, match="lacks: blocks.3.attn.qkv.bias, final_layer_extra.weight"):
        parameter_names.from_published(state, SMALL)


@pytest.mark.parametrize("name", ["blocks.2.attn.proj.bias", "x_embedder.proj.bias"])
def test_a_name_of_the_wrong_size_is_told_with_both_sizes(state, name):
    state[name] = np.zeros(13)
    with pytest.raises(ValueError, match=rf"'{name}' has 13 values, shape \(13,\).* 12"):
        parameter_names.from_published(state, SMALL)


def test_a_parameter_of_ours_that_nothing_published_has_is_told(state):
    with pytest.raises(ValueError, match="'rope.table' has no published counterpart"):
        parameter_names.from_published(state, {**SMALL, "rope": {"table": np.zeros(3)}})


@pytest.mark.parametrize(
    "like", [SMALL, make_lightningdit(3, 16, 2, side=4, channels=4, classes=5)], ids=["sit", "ldit"]
)
def test_parameters_survive_the_way_there_and_back_bit_for_bit(like):
    params = random_like(like)
    state = parameter_names.to_published(params)
    expected = published(params)
    assert list(state) and set(state) == set(expected)
    for name, array in state.items():
        assert array.flags["C_CONTIGUOUS"], name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    back = parameter_names.from_published(state, like)
    for path, leaf in pytree.flatten(back).items():
        np.testing.assert_array_equal(leaf, pytree.flatten(params)[path], err_msg=path)


def test_all_that_is_wrong_with_a_state_dict_is_told_at_once(state):
    del state["pos_embed"], state["blocks.1.mlp.fc1.weight"]
    state |= {"final_layer.linear.bias": np.zeros(13), "extra.weight": np.zeros(3)}
    with pytest.raises(ValueError) as error:
        parameter_names.from_published(state, SMALL)
    for part in ("lacks 'pos_embed'", "fc1.weight'", "bias' has 13 values", "lacks: extra.weight"):
        assert part in str(error.value)


@pytest.mark.golden
@pytest.mark.parametrize("network", ["base", "patch2"])
def test_rotary_tables_are_those_of_published_files(golden_dir, network):
    published = load_file(golden_file(golden_dir, f"lightningdit_forward_{network}.safetensors"))
    tokens, head_dim = published["feat_rope.freqs_cos"].shape
    tables = parameter_names.rotary_tables(round(tokens**0.5), head_dim)
    assert set(tables) == set(parameter_names.DERIVED)
    for name, table in tables.items():
        np.testing.assert_allclose(table, published[name], rtol=0, atol=1e-6)
        assert table.dtype == np.float32
