"""LightningDiT beyond the golden vectors: sizes, start, direction, rotation, precision, scan."""

import dataclasses

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
from tiers import slow_but

from ig_jax import pytree
from ig_jax.models import layers
from ig_jax.models.lightningdit import SIZES, LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.transformer import Transformer

SETTINGS = LightningDiTSettings(
    **{**dataclasses.asdict(lively.SETTINGS), "patch_size": 1},
    swiglu=True,
    rope=True,
    rms_norm=True,
    shift=True,
)


class Plain(Transformer):
    """A LightningDiT in the published direction of time."""

    readout_init = LightningDiT.readout_init


def make(**changes) -> Network:
    return Network(LightningDiT, dataclasses.replace(SETTINGS, **changes), 4, 3, lively.CLASSES)


@pytest.fixture(scope="module")
def params():
    return lively.parameters(make())


@pytest.mark.parametrize("patch", slow_but([1], [1, 2]))
@pytest.mark.parametrize("size", slow_but(["B", "XL"], SIZES))
def test_every_published_size_has_a_gated_mlp_of_two_thirds_and_all_parameters(size, patch):
    depth, d, heads = SIZES[size]
    sizes = {"depth": depth, "hidden_size": d, "num_heads": heads, "patch_size": patch}
    settings = dataclasses.replace(SETTINGS, **sizes, mlp_ratio=4.0, readouts=(8,))
    shapes = lively.abstract(Network(LightningDiT, settings, 16, 32, 1000))
    hidden, features = int(2 / 3 * 4 * d), 32 * patch**2
    block = 4 * d * d + 4 * d + 3 * d * hidden + 2 * hidden + d + 6 * d * (d + 1) + 2 * d
    head = 2 * d * (d + 1) + features * (d + 1) + d
    rest = features * d + d + 256 * d + d + d * d + d + 1001 * d + (16 // patch) ** 2 * d
    assert pytree.count(shapes) == depth * block + 2 * head + rest


def test_the_final_head_starts_at_zero_and_the_early_one_does_not():
    net = make()
    fresh = jax.jit(net.init)(jax.random.key(0))
    out = lively.forward(net, fresh, *lively.inputs(net))
    assert not np.any(out.pred)
    for depth, early in out.heads.items():
        assert np.std(early) > 0.1
        for name, fan_out in (("modulation", 48), ("linear", 3)):
            kernel = fresh["heads"][f"depth_{depth}"][name]["kernel"]
            assert np.std(kernel) == pytest.approx(np.sqrt(2 / (24 + fan_out)), rel=0.2)


@pytest.mark.slow
def test_time_and_sign_are_those_of_the_plain_transformer_turned_round(params):
    net = make()
    x, t, y = lively.inputs(net)
    ours = net(params, x, t, y)
    theirs = dataclasses.replace(net, family=Plain)(params, x, 1 - t, y)
    lively.close(ours.pred, -theirs.pred)
    lively.close(ours.heads, jax.tree.map(lambda v: -v, theirs.heads))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"unroll": 3}, {"remat": "full"}, {"remat": "dots"}])
def test_scanning_and_recomputing_change_nothing(params, changes):
    def loss(p, net):
        return lively.weighted_sum(net, p)

    grads = [
        lively.compile_quickly(jax.grad(lambda p, net=net: loss(p, net)))(params)
        for net in (make(), make(**changes))
    ]
    lively.close(*grads, rtol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_near_float32(params):
    x, t, y = lively.inputs(make())
    exact = lively.forward(make(), params, x, t, y).pred
    half = lively.forward(make(dtype="bfloat16"), params, x, t, y).pred
    assert half.dtype == jnp.float32
    assert 1e-5 < np.max(np.abs(half - exact)) / np.std(exact) < 0.1


@pytest.mark.parametrize(
    "option",
    slow_but(["rope", "qk_norm"], ["swiglu", "rope", "rms_norm", "shift", "qk_norm"]),
)
def test_every_option_changes_what_the_network_computes(option):
    net, other = make(), make(**{option: not getattr(SETTINGS, option)})
    results = [
        lively.forward(n, lively.parameters(n), *lively.inputs(n)).pred for n in (net, other)
    ]
    assert np.max(np.abs(results[0] - results[1])) > 1e-2


@pytest.mark.slow
def test_with_all_options_off_the_blocks_are_those_of_sit():
    off = {name: False for name in ("swiglu", "rope", "rms_norm")}
    net, sit = make(**off), lively.make(patch_size=1)
    shared = lively.parameters(sit)
    x, t, y = lively.inputs(sit)
    lively.close(-net(shared, x, 1 - t, y).pred, sit(shared, x, t, y).pred)


# Rotation.


def dots(side: int, shift: int) -> np.ndarray:
    """q.k after rotation for all pairs of tokens of a grid, of one query and one key everywhere."""
    rng = np.random.default_rng(0)
    q, k = (
        jnp.broadcast_to(jnp.asarray(rng.standard_normal(8), jnp.float32), (1, side**2, 1, 8))
        for _ in range(2)
    )
    q, k = (np.asarray(layers.rotate(v))[0, :, 0].reshape(side, side, 8) for v in (q, k))
    return q[shift:, shift:][:3, :3].reshape(-1, 8) @ k[shift:, shift:][:3, :3].reshape(-1, 8).T


def test_rotated_products_depend_on_the_distance_between_tokens_alone():
    np.testing.assert_allclose(dots(5, 0), dots(5, 2), atol=1e-5)
    assert np.ptp(dots(5, 0)) > 1


def test_rotation_keeps_lengths_and_leaves_the_first_token():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 3, 8)), jnp.float32)
    turned = layers.rotate(x)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])


def test_rows_turn_the_first_half_of_a_head_and_columns_the_second():
    x = jnp.ones((1, 9, 1, 8))
    turned = np.asarray(layers.rotate(x)).reshape(3, 3, 8)
    for row in range(3):
        np.testing.assert_allclose(turned[row, :, :4], turned[row, :1, :4].repeat(3, 0))
        np.testing.assert_allclose(turned[:, row, 4:], turned[:1, row, 4:].repeat(3, 0))
    assert np.all(np.abs(turned[1, 0, :2] - 1) > 0.01) and np.all(turned[1, 0, 4:] == 1)


def test_a_head_that_cannot_be_rotated_is_refused_and_without_rotation_taken():
    with pytest.raises(ValueError, match="hidden_size = 36: with rope, a head's 18 .* by 4"):
        make(hidden_size=36, num_heads=2)
    make(hidden_size=36, num_heads=2, rope=False)
