"""Groups of tokens in a network: what they leave unchanged, what they separate, what they cost."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
from tiers import slow_but

from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.sit import SIZES, SiT, SiTSettings
from ig_jax.objectives.token_groups import of_pixels
from ig_jax.types import TokenGroups

MIB = 2**20


def two_groups(net, x) -> jax.Array:
    """Uneven groups, no sample's like another's."""
    tokens = net.settings.num_tokens(net.side)
    return jax.random.bernoulli(jax.random.key(5), 0.3, (len(x), tokens)).astype(jnp.int32)


def kinds():
    sit = lively.make()
    yield "sit", sit
    yield "unrolled", replace(sit, settings=replace(sit.settings, unroll=sit.settings.depth))


@pytest.mark.slow
@pytest.mark.parametrize("net", [pytest.param(net, id=name) for name, net in kinds()])
def test_groups_at_one_time_with_full_attention_are_none(net):
    x, t, y = lively.inputs(net)
    params, ids = lively.parameters(net), two_groups(net, x)
    plain = net(params, x, t, y)
    both = jnp.stack([t, t], axis=1)
    found = net(params, x, both, y, groups=TokenGroups(condition=ids))
    np.testing.assert_allclose(found.pred, plain.pred, rtol=1e-5, atol=1e-6)
    whole = TokenGroups(attention=jnp.zeros_like(ids) + 3)
    np.testing.assert_allclose(
        net(params, x, t, y, groups=whole).pred, plain.pred, rtol=1e-5, atol=1e-6
    )


def test_with_separated_attention_nothing_of_one_group_reaches_the_other():
    """Neither its latents nor its time; with full attention both do."""
    net = lively.make()
    x, t, y = lively.inputs(net)
    params, ids = lively.parameters(net), two_groups(net, x)
    last = net.settings.depth

    def tokens(x, second, attention):
        times = jnp.stack([t, second], axis=1)
        groups = TokenGroups(condition=ids, attention=attention)
        return net.tokens(params, x, times, y, (last,), groups)[last]

    other = jnp.where(of_pixels(ids, net.side) == 1, x + 1, x)
    for attention, apart in ((ids, True), (None, False)):
        before, after = tokens(x, t, attention), tokens(other, 0.5 * t, attention)
        first = np.asarray(ids) == 0
        assert np.allclose(before[first], after[first], rtol=1e-6, atol=1e-6) == apart
        assert not np.allclose(before[~first], after[~first], atol=1e-3)


def test_the_order_of_groups_does_not_matter():
    net = lively.make()
    x, t, y = lively.inputs(net)
    params, ids = lively.parameters(net), two_groups(net, x)
    times = jnp.stack([t, 1 - t], axis=1)
    one = net(params, x, times, y, groups=TokenGroups(condition=ids, attention=ids))
    swapped = TokenGroups(condition=1 - ids, attention=7 - ids)
    np.testing.assert_allclose(
        net(params, x, times[:, ::-1], y, groups=swapped).pred, one.pred, rtol=1e-5, atol=1e-6
    )


# Memory, of XL at batch 8, as the compiler plans it.


def temporaries(times: int, gradient: bool, **kinds) -> float:
    """MiB of a pass of SiT-XL/2, or of its gradient, with groups of these kinds."""
    depth, width, heads = SIZES["XL"]
    settings = SiTSettings(
        depth=depth, hidden_size=width, num_heads=heads, patch_size=2, mlp_ratio=4.0,
        qk_norm=False, readouts=(), time_scale=1.0, dtype="bfloat16", remat="dots", unroll=1,
    )  # fmt: skip
    net, of = Network(SiT, settings, 32, 4, 1000), jax.ShapeDtypeStruct
    t = of((8,) if times == 1 else (8, times), jnp.float32)
    groups = TokenGroups(**{kind: of((8, 256), jnp.int32) for kind in kinds})

    def run(params, x, t, y, groups):
        return net(params, x, t, y, groups=groups).pred

    program = jax.grad(lambda *a: jnp.sum(run(*a))) if gradient else run
    arguments = lively.abstract(net), of((8, 32, 32, 4), jnp.float32), t, of((8,), jnp.int32)
    compiled = jax.jit(program).lower(*arguments, groups).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


@pytest.mark.parametrize("gradient", slow_but([False], [False, True]))
def test_times_of_groups_cost_no_modulation_of_each_token(gradient):
    """That would be [8, 256, 6 x 1152] for every block: 27 MiB as bfloat16, kept or not."""
    plain = temporaries(1, gradient)
    assert temporaries(2, gradient, condition=True) < plain + 13


@pytest.mark.parametrize("gradient", slow_but([False], [False, True]))
def test_separation_costs_at_most_one_buffer_of_logits(gradient):
    """One block's [8, 16, 256, 256] is 32 MiB, where the selection is not fused."""
    plain = temporaries(1, gradient)
    assert temporaries(1, gradient, attention=True) < plain + 33


# The trunk alone.


def lightningdit():
    kinds = {"swiglu": True, "rope": True, "rms_norm": True, "shift": True}
    sizes = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "mlp_ratio": 4.0}
    rest = {"time_scale": 1.0, "dtype": "float32", "remat": "none", "unroll": 1, "qk_norm": True}
    settings = LightningDiTSettings(**sizes, **kinds, **rest, readouts=(2,))
    return Network(LightningDiT, settings, 8, 4, 5)


FAMILIES = {
    **dict(kinds()),
    "dit": replace(lively.make(), family=DiT),
    "lightningdit": lightningdit(),
}
one_family = pytest.mark.parametrize(
    "net",
    [
        pytest.param(net, id=name, marks=() if name == "sit" else pytest.mark.slow)
        for name, net in FAMILIES.items()
    ],
)


@pytest.mark.parametrize("grouped", slow_but([True], [False, True]))
@one_family
def test_tokens_are_those_that_a_whole_pass_taps(net, grouped):
    """In every family's own direction of time; in any order of depths, and one twice."""
    x, t, y = lively.inputs(net)
    params, ids = lively.parameters(net), two_groups(net, x)
    groups = TokenGroups(condition=ids, attention=ids) if grouped else None
    t = jnp.stack([t, 0.3 * t], axis=1) if grouped else t
    depths = (2, 1, 2)
    whole = net(params, x, t, y, taps=(1, 2), groups=groups).features
    alone = net.tokens(params, x, t, y, depths, groups)
    assert alone.keys() == {1, 2}
    for depth in alone:
        np.testing.assert_allclose(alone[depth], whole[depth], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grouped", slow_but([True], [False, True]))
@one_family
def test_an_early_prediction_alone_is_that_of_a_whole_pass(net, grouped):
    """In every family's own direction of time, and of the velocity."""
    x, t, y = lively.inputs(net)
    params, groups = lively.parameters(net), None
    if grouped:
        ids = two_groups(net, x)
        groups, t = TokenGroups(condition=ids, attention=ids), jnp.stack([t, 0.3 * t], axis=1)
    whole = net(params, x, t, y, groups=groups).heads
    assert whole
    for depth, pred in whole.items():
        alone = net.early(params, x, t, y, depth, groups=groups)
        assert np.abs(pred).max() > 1e-2
        np.testing.assert_allclose(alone, pred, rtol=1e-5, atol=1e-6)
