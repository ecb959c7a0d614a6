"""Sizes, initial values and layout conventions of SiT, against the papers and small cases by hand.

Parameter counts of SiT-XL/2 and SiT-B/2 with one readout are those of the published state dicts
(tests/golden/keys).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
from flax import nnx
from tiers import slow_but

from ig_jax import optim, pytree
from ig_jax.models import embed
from ig_jax.models.network import Network
from ig_jax.models.sit import SIZES, SiT, SiTSettings

SETTINGS = SiTSettings(
    depth=2,
    hidden_size=64,
    num_heads=4,
    patch_size=2,
    mlp_ratio=2.0,
    qk_norm=True,
    readouts=(1,),
    time_scale=1.0,
    dtype="float32",
    remat="none",
    unroll=1,
)
NET = Network(SiT, SETTINGS, side=4, channels=5, num_classes=99)


def published(size: str, patch_size: int) -> Network:
    """A size of the papers for 256-pixel images, with one readout."""
    depth, hidden_size, num_heads = SIZES[size]
    shape = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
    rest = {"patch_size": patch_size, "mlp_ratio": 4.0, "qk_norm": False, "readouts": (4,)}
    return Network(SiT, dataclasses.replace(SETTINGS, **shape, **rest), 32, 4, 1000)


@functools.cache
def abstract(net: Network):
    return net.abstract_params


def outputs(net: Network, batch: int, taps: tuple[int, ...]):
    """Shapes of everything that leaves the network."""
    x = jax.ShapeDtypeStruct((batch, *net.latent_shape), jnp.float32)
    t, y = (jax.ShapeDtypeStruct((batch,), kind) for kind in (jnp.float32, jnp.int32))
    return jax.eval_shape(lambda *args: net(*args, taps=taps), abstract(net), x, t, y)


@pytest.mark.parametrize("size", slow_but(["S"], SIZES))
@pytest.mark.parametrize("patch", slow_but([2], [2, 4, 8]))
def test_every_size_and_patch_has_the_parameters_that_its_layers_add_up_to(size, patch):
    net = published(size, patch)
    depth, d, _ = SIZES[size]
    pixels, tokens = patch**2 * 4, (32 // patch) ** 2
    block = 3 * d * (d + 1) + d * (d + 1) + 4 * d * (d + 1) + d * (4 * d + 1) + 6 * d * (d + 1)
    head = 2 * d * (d + 1) + pixels * (d + 1)
    embedders = tokens * d + d * (pixels + 1) + d * (256 + 1) + d * (d + 1) + 1001 * d
    assert pytree.count(abstract(net)) == depth * block + 2 * head + embedders
    heads = abstract(net)["blocks"]["attn"]["qkv"]["kernel"].shape[-2:]
    assert heads == {"S": (6, 64), "B": (12, 64), "L": (16, 64), "XL": (16, 72)}[size]
    out = outputs(net, batch=2, taps=())
    assert out.pred.shape == out.heads[4].shape == (2, 32, 32, 4)


@pytest.mark.parametrize(
    "size, everything, trained",
    [("XL", 677_786_144, 677_491_232), ("B", 131_693_600, 131_496_992)],
)
def test_published_sizes_have_the_published_numbers_of_parameters(size, everything, trained):
    leaves = pytree.flatten(abstract(published(size, 2)))
    assert pytree.count(leaves) == everything
    assert pytree.count({p: v for p, v in leaves.items() if not optim.is_fixed(p)}) == trained


@pytest.mark.parametrize(
    "side, patch, channels",
    [
        (8, 2, 4),
        (6, 3, 5),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((8, 4, 3), (16, 8, 1), (1, 1, 7))),
    ],
)
def test_outputs_have_the_shape_of_the_latents_and_taps_a_token_a_patch(side, patch, channels):
    net = Network(SiT, dataclasses.replace(SETTINGS, patch_size=patch), side, channels, 10)
    out = outputs(net, batch=3, taps=(2,))
    assert out.pred.shape == out.heads[1].shape == (3, side, side, channels)
    assert out.features[2].shape == (3, (side // patch) ** 2, SETTINGS.hidden_size)


def test_a_patch_that_does_not_divide_the_latents_is_refused():
    settings = dataclasses.replace(SETTINGS, patch_size=3)
    with pytest.raises(ValueError, match="patch_size = 3: must divide the side of the latents, 4"):
        Network(SiT, settings, 4, 3, 10)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 0}, "depth = 0: must be at least 1"),
        ({"hidden_size": 66}, "hidden_size = 66: must be divisible by 4"),
        ({"num_heads": 5}, "hidden_size = 64: must be divisible by num_heads = 5.*: 65"),
        ({"dtype": "float64"}, "dtype = 'float64': must be one of float32, bfloat16"),
        ({"remat": "some"}, "remat = 'some': must be one of none, dots, full"),
        ({"readouts": (2,)}, r"readouts = \(2,\): 2 must lie in 1..1"),
        ({"readouts": (0,)}, r"readouts = \(0,\): 0 must lie in 1..1"),
        ({"readouts": (1, 1)}, r"readouts = \(1, 1\): name each depth once"),
    ],
)
def test_a_setting_that_makes_no_network_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changes)


# Initial values


initialise = lively.compile_quickly(NET.init)


@pytest.fixture(scope="module")
def initial():
    return initialise(jax.random.key(0))


# Rows and columns of every Xavier-uniform matrix, as the published models lay them out.
FANS = {
    "x_embedder.proj.kernel": (2 * 2 * 5, 64),
    "blocks.attn.qkv.kernel": (64, 3 * 64),
    "blocks.attn.proj.kernel": (64, 64),
    "blocks.mlp.fc1.kernel": (64, 128),
    "blocks.mlp.fc2.kernel": (128, 64),
}
NORMAL = ["t_embedder.fc1.kernel", "t_embedder.fc2.kernel", "y_embedder.table.embedding"]
ONES = ["blocks.attn.q_norm.scale", "blocks.attn.k_norm.scale"]


@pytest.mark.parametrize("name, fans", FANS.items())
def test_matrices_start_xavier_uniform(name, fans, initial):
    values = np.asarray(pytree.flatten(initial)[name], np.float64).ravel()
    bound = np.sqrt(6 / sum(fans))
    assert 0.99 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
    # Five standard errors of the spread of a uniform, and of its mean.
    spread, n = bound / np.sqrt(3), len(values)
    assert abs(values.std() / spread - 1) < 5 * 0.45 / np.sqrt(n)
    assert abs(values.mean()) < 5 * spread / np.sqrt(n)


@pytest.mark.parametrize("name", NORMAL)
def test_embeddings_start_normal_with_spread_002(name, initial):
    values = np.asarray(pytree.flatten(initial)[name], np.float64).ravel() / 0.02
    n = len(values)
    # Five standard errors of three moments: a truncated or a uniform draw fails.
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 4: (3, 96)}.items():
        assert abs(np.mean(values**power) - moment) < 5 * np.sqrt(variance / n), power


def test_everything_else_starts_at_zero_but_norm_scales_and_the_position_table(initial):
    leaves = pytree.flatten(initial)
    rest = {name: leaf for name, leaf in leaves.items() if name not in [*FANS, *NORMAL, *ONES]}
    np.testing.assert_array_equal(rest.pop("pos_embed"), embed.position_table(2, 64))
    assert {name for name, leaf in rest.items() if np.any(leaf)} == set()
    assert all(np.all(leaves[name] == 1) for name in ONES)
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"float32"}


def test_every_block_and_every_key_draws_its_own_matrices(initial):
    other = pytree.flatten(initialise(jax.random.key(1)))
    for name in [*FANS, *NORMAL]:
        values = pytree.flatten(initial)[name]
        assert not np.any(values == other[name]), name
        if name.startswith("blocks"):
            assert not np.any(values[0] == values[1]), name


def test_both_heads_predict_exactly_zero_at_the_start(initial):
    x = jax.random.normal(jax.random.key(0), (2, *NET.latent_shape))
    out = lively.compile_quickly(NET)(initial, x, jnp.array([0.1, 0.9]), jnp.array([3, 99]))
    assert not np.any(out.pred) and not np.any(out.heads[1])


# Layout conventions


def test_position_table_is_column_then_row_each_sines_then_cosines():
    s, c = np.sin, np.cos
    f = 0.01  # the second of two frequencies, 10000^(-1/2)
    tokens = [  # row-major over a 2 x 2 grid: (row, column)
        [s(0), s(0), c(0), c(0), s(0), s(0), c(0), c(0)],  # (0, 0)
        [s(1), s(f), c(1), c(f), s(0), s(0), c(0), c(0)],  # (0, 1)
        [s(0), s(0), c(0), c(0), s(1), s(f), c(1), c(f)],  # (1, 0)
        [s(1), s(f), c(1), c(f), s(1), s(f), c(1), c(f)],  # (1, 1)
    ]
    np.testing.assert_allclose(embed.position_table(2, 8), [tokens], rtol=1e-6)


def test_time_features_are_cosines_then_sines_of_the_time_as_it_is():
    t, f = 0.5, 0.01
    features = embed.time_features(jnp.array([t, 0.0]), dim=4)
    expected = [[np.cos(t), np.cos(t * f), np.sin(t), np.sin(t * f)], [1, 1, 0, 0]]
    np.testing.assert_allclose(features, expected, rtol=1e-6)


def test_time_features_of_late_steps_are_those_of_the_published_frequencies():
    """One last place of a frequency is 6e-5 of a feature at t = 999."""
    t = np.float32([1, 333, 950, 998, 999])
    exponents = np.float32(-np.log(10_000)) * np.arange(128, dtype=np.float32) / np.float32(128)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (t[:, None] * frequencies[None]).astype(np.float64)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    for features in (embed.time_features, jax.jit(embed.time_features)):
        np.testing.assert_allclose(features(jnp.asarray(t)), expected, rtol=0, atol=2e-7)


def test_a_token_unfolds_row_by_row_with_the_channel_fastest():
    tokens = jnp.array([[[0, 10, 1, 11, 2, 12, 3, 13]] + [[9, 9, 9, 9, 9, 9, 9, 9]] * 3], float)
    image = embed.unpatchify(tokens, 2)
    assert image.shape == (1, 4, 4, 2)
    assert image[0, :2, :2, 0].tolist() == [[0, 1], [2, 3]]
    assert image[0, :2, :2, 1].tolist() == [[10, 11], [12, 13]]


@pytest.mark.parametrize("patch, channels", [(2, 3), (4, 1)])
def test_unfolding_undoes_cutting_into_patches(patch, channels):
    values = patch**2 * channels
    cut = embed.PatchEmbed(channels, values, patch, dtype=jnp.float32, rngs=nnx.Rngs(0))
    cut.proj.kernel[...] = jnp.eye(values).reshape(patch, patch, channels, values)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, channels))
    back = jax.jit(lambda x: embed.unpatchify(cut(x), patch))(x)
    np.testing.assert_allclose(back, x, rtol=1e-6)
