"""Self-conditioning: its formula, what it leaves alone, what each block is conditioned on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
from flax import nnx
from tiers import slow_but

from ig_jax import pytree
from ig_jax.models import axes
from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.self_conditioning import SelfConditioning, SelfConditioningSettings
from ig_jax.models.sit import SiT
from ig_jax.monitoring import flops
from ig_jax.optim.matrix_axes import matrix_of
from ig_jax.types import TokenGroups

ON = SelfConditioningSettings(tap=2, normalise=True, scaling="channels", stop_gradient=False)
# A readout at the tap, one beyond it, and one before.
SETTINGS = dataclasses.replace(lively.SETTINGS, depth=4, readouts=(3, 1, 2), self_conditioning=ON)
BLOCKS = {"swiglu": True, "rope": True, "rms_norm": True, "shift": True}
LIGHT = LightningDiTSettings(
    **{f.name: getattr(SETTINGS, f.name) for f in dataclasses.fields(SETTINGS)}, **BLOCKS
)
FAMILIES = {"sit": (SiT, SETTINGS), "dit": (DiT, SETTINGS), "lightningdit": (LightningDiT, LIGHT)}
every_family = pytest.mark.parametrize("family", FAMILIES)
one_family = pytest.mark.parametrize("family", slow_but(["lightningdit"], FAMILIES))


def network(family: str = "sit", on=ON, **changes) -> Network:
    module, settings = FAMILIES[family]
    settings = dataclasses.replace(settings, self_conditioning=on, **changes)
    return Network(module, settings, 4, 3, lively.CLASSES)


def choice(**changes) -> SelfConditioningSettings:
    return dataclasses.replace(ON, **changes)


def without_projection(params):
    """The same parameters with a projection of zero."""
    zero = jax.tree.map(jnp.zeros_like, params["self_conditioning"]["project"])
    return {**params, "self_conditioning": {**params["self_conditioning"], "project": zero}}


def without_section(params):
    return {name: leaf for name, leaf in params.items() if name != "self_conditioning"}


@functools.cache
def run(net: Network):
    """The network with the tokens after all blocks."""
    return lively.compile_quickly(functools.partial(net, taps=(1, 2, 3, 4)))


@functools.cache
def loss_and_gradient(net: Network):
    loss = functools.partial(lively.weighted_sum, net)
    return lively.compile_quickly(jax.value_and_grad(loss))


# The formula.


def in_numpy(params, tokens, times, c, settings, groups=None):
    """c' of one image, float64: tokens [n, d], times and c [d], or [g, d] for groups [n]."""
    h, times, c = (np.asarray(array, np.float64) for array in (tokens, times, c))
    if settings.normalise:
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    f = h.mean(0) if groups is None else np.stack([h[groups == g].mean(0) for g in range(len(c))])
    p = pytree.map_named(lambda _, leaf: np.asarray(leaf, np.float64), params)
    routed = f @ p["project"]["kernel"] + p["project"]["bias"]
    if settings.scaling == "none":
        return c + routed
    silu = times / (1 + np.exp(-times))
    return c + (silu @ p["scale"]["kernel"] + p["scale"]["bias"]) * routed


def drawn(settings, *, groups=(), width=24, seed=7):
    """A module with random parameters, and (tokens, times, c), of which tokens are not centred."""
    rng = np.random.default_rng(seed)
    module = SelfConditioning(width, settings, rngs=nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    nnx.update(module, jax.tree.map(lambda leaf: draw(*leaf.shape), state))
    # So small that the epsilon of the normalisation counts.
    tokens = 0.02 * draw(2, 9, width) + 0.013
    return module, tokens, draw(2, *groups, width), draw(2, *groups, width)


@pytest.mark.parametrize("scaling", ["channels", "scalar", "none"])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_condition_is_that_of_the_formula(scaling, normalise):
    settings = choice(scaling=scaling, normalise=normalise)
    module, tokens, times, c = drawn(settings)
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert ("scale" in params) == (scaling != "none")
    for i, found in enumerate(module(tokens, times, c)):
        expected = in_numpy(params, tokens[i], times[i], c[i], settings)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_each_group_has_the_mean_of_its_own_tokens_and_the_factor_of_its_own_time():
    module, tokens, times, c = drawn(ON, groups=(3,))
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    ids = np.array([[0, 2, 1, 1, 2, 1, 0, 1, 1], [1, 1, 0, 2, 2, 2, 0, 0, 2]])
    found = module(tokens, times, c, TokenGroups(condition=jnp.asarray(ids)))
    for i in range(2):
        expected = in_numpy(params, tokens[i], times[i], c[i], ON, ids[i])
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)


def test_a_group_without_tokens_has_a_mean_of_zero():
    module, tokens, times, c = drawn(choice(scaling="none"), groups=(2,))
    ids = jnp.ones((2, 9), jnp.int32)
    found = module(tokens, times, c, TokenGroups(condition=ids))
    np.testing.assert_allclose(found[:, 0] - c[:, 0], [module.project.bias[...]] * 2, atol=1e-5)


def test_the_order_of_tokens_does_not_matter():
    module, tokens, times, c = drawn(ON)
    mixed = tokens[:, np.random.default_rng(3).permutation(9)]
    assert np.abs(mixed - tokens).max() > 0.01
    np.testing.assert_allclose(module(mixed, times, c), module(tokens, times, c), atol=1e-4)


def test_groups_that_do_not_see_each_other_are_refused():
    module, tokens, times, c = drawn(ON)
    apart = TokenGroups(attention=jnp.zeros((2, 9), jnp.int32))
    with pytest.raises(ValueError, match=r"groups\.attention: model\.self_conditioning pools"):
        module(tokens, times, c, apart)


# The network.


@pytest.mark.slow
@pytest.mark.parametrize(("family", "unroll"), [("sit", 1), ("lightningdit", 4)])
def test_a_projection_of_zero_is_the_network_without_it(family, unroll):
    """In its values, and in the gradients of everything else."""
    net = network(family, unroll=unroll)
    params = without_projection(lively.parameters(net))
    value, gradient = loss_and_gradient(net)(params)
    plain = loss_and_gradient(network(family, None, unroll=unroll))(without_section(params))
    lively.close((value, without_section(gradient)), plain, rtol=2e-5)


@one_family
def test_fresh_parameters_are_those_without_it_and_change_nothing(family):
    net, key = network(family), jax.random.key(3)
    fresh, plain = net.init(key), network(family, None).init(key)
    assert pytree.digest(without_section(fresh)) == pytree.digest(plain)
    on = pytree.flatten(fresh["self_conditioning"])
    assert {path: np.unique(leaf).tolist() for path, leaf in on.items()} == {
        "project.kernel": [0], "project.bias": [0], "scale.kernel": [0], "scale.bias": [1],
    }  # fmt: skip


def test_with_a_projection_of_zero_the_projection_learns_and_the_scale_does_not_yet():
    net = network()
    _, gradient = loss_and_gradient(net)(without_projection(lively.parameters(net)))
    on = gradient["self_conditioning"]
    assert not np.any(on["scale"]["kernel"]) and not np.any(on["scale"]["bias"])
    assert np.abs(on["project"]["kernel"]).min() > 0 and np.abs(on["project"]["bias"]).min() > 0


def changed_by_the_projection(net: Network) -> dict[str, float]:
    """Output -> its largest change where the projection is set to zero."""

    def outputs(params):
        out = run(net)(params, *lively.inputs(net))
        heads = {f"readout {depth}": value for depth, value in out.heads.items()}
        tokens = {f"tokens {depth}": value for depth, value in out.features.items()}
        return heads | tokens | {"prediction": out.pred}

    params = lively.parameters(net)
    a, b = outputs(params), outputs(without_projection(params))
    return {name: np.abs(a[name] - b[name]).max() for name in a}


@pytest.mark.parametrize(
    ("family", "unroll"),
    [
        pytest.param(family, unroll, marks=() if family == "lightningdit" else pytest.mark.slow)
        for family, unroll in (*((f, 1) for f in FAMILIES), ("sit", 4))
    ],
)
def test_only_what_lies_behind_the_tap_sees_it(family, unroll):
    found = changed_by_the_projection(network(family, unroll=unroll))
    seen = {name for name, change in found.items() if change > 1e-3}
    assert seen == {"readout 3", "tokens 3", "tokens 4", "prediction"}
    assert all(change == 0 for name, change in found.items() if name not in seen)


@pytest.mark.parametrize("tap", slow_but([1, None], [1, 3, None]))  # None: half of the depth
def test_the_tap_is_where_the_settings_say(tap):
    net = network(on=choice(tap=tap))
    assert net.settings.tap == (tap or 2)
    seen = {name for name, change in changed_by_the_projection(net).items() if change > 1e-3}
    assert {name for name in seen if "tokens" in name} == {
        f"tokens {depth}" for depth in range((tap or 2) + 1, 5)
    }


@one_family
def test_the_network_is_its_blocks_with_the_condition_of_the_formula(family):
    """Block by block, outside of any loop; the final layer and a late readout see c', too."""
    net = network(family)
    params, (x, t, y) = lively.parameters(net), lively.inputs(net)
    out = run(net)(params, x, t, y)
    module = net.module(jax.random.key(0))
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(module, state)
    times, c = module._condition(t, y)
    on = params["self_conditioning"]
    routed = [in_numpy(on, *each, ON) for each in zip(out.features[2], times, c, strict=True)]
    changed = jnp.asarray(np.stack(routed), jnp.float32)
    tokens = out.features[2]
    for i in (2, 3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        tokens = nnx.merge(nnx.graphdef(module.blocks), one)(tokens, changed)
        if i == 2:
            third = module.heads["depth_3"](tokens, changed)
    sign = -1 if family == "lightningdit" else 1
    lively.close(out.features[4], tokens, rtol=1e-4)

    def latents(values):  # patches of 2 x 2, channels last
        grid = values.reshape(3, 2, 2, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
        return sign * grid.reshape(3, 4, 4, -1)[..., :3]

    lively.close(out.pred, latents(module.final_layer(tokens, changed)), rtol=1e-4)
    lively.close(out.heads[3], latents(third), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"unroll": 4, "remat": "full"}, {"remat": "dots"}, {"remat": "full"}]
)
def test_unrolling_and_recomputing_change_neither_output_nor_gradient(changes):
    params = lively.parameters(network())
    found = loss_and_gradient(network(**changes))(params)
    lively.close(found, loss_and_gradient(network())(params), rtol=5e-5)


@pytest.mark.slow
def test_the_gradient_is_the_slope_along_every_parameter_of_it():
    net = network()
    params = lively.parameters(net)
    loss = lively.compile_quickly(functools.partial(lively.weighted_sum, net))
    rng, step = np.random.default_rng(3), 0.01
    leaves, slopes = pytree.flatten(params), pytree.flatten(loss_and_gradient(net)(params)[1])
    for name in [name for name in leaves if name.startswith(("self_cond", "t_embedder"))]:
        way = rng.standard_normal(leaves[name].shape).astype(np.float32)
        way /= np.linalg.norm(way)
        there, back = (
            loss(pytree.unflatten({**leaves, name: leaves[name] + sign * step * way}))
            for sign in (1, -1)
        )
        slope = (float(there) - float(back)) / (2 * step)
        assert float(np.sum(way * slopes[name])) == pytest.approx(slope, abs=0.01, rel=0.01), name


def test_with_the_gradient_stopped_nothing_before_the_tap_learns_through_the_feature():
    """Then the blocks before it learn what they learn from tokens alone; the projection learns."""
    params = lively.parameters(network())
    _, through = loss_and_gradient(network())(params)
    _, stopped = loss_and_gradient(network(on=choice(stop_gradient=True)))(params)
    of_blocks = [g["blocks"]["mlp"]["fc1"]["kernel"] for g in (through, stopped)]
    difference = np.abs(of_blocks[0] - of_blocks[1]).max(axis=(1, 2))
    assert np.all(difference[:2] > 1e-3) and np.all(difference[2:] < 1e-4)
    lively.close(stopped["self_conditioning"], through["self_conditioning"], rtol=1e-4)


@pytest.mark.slow
def test_a_pass_to_a_block_gives_the_tokens_of_a_whole_one():
    net = network()
    params, inputs = lively.parameters(net), lively.inputs(net)
    whole = run(net)(params, *inputs)
    for depths in ((2,), (4,), (3, 1)):
        found = lively.compile_quickly(functools.partial(net.tokens, depths=depths))(
            params, *inputs
        )
        assert set(found) == set(depths)
        lively.close(found, {d: whole.features[d] for d in depths})


def test_every_image_of_a_batch_has_a_feature_of_its_own():
    """So both halves of classifier-free guidance do."""
    net = network()
    params, (x, t, y) = lively.parameters(net), lively.inputs(net)
    null = jnp.full_like(y, lively.CLASSES)
    both = run(net)(params, *(jnp.concatenate(pair) for pair in ((x, x), (t, t), (y, null))))
    lively.close(both.pred[:3], run(net)(params, x, t, y).pred)
    lively.close(both.pred[3:], run(net)(params, x, t, null).pred)


def test_groups_at_one_time_differ_from_one_image_only_in_their_own_means():
    net = network()
    params, (x, t, y) = lively.parameters(net), lively.inputs(net)
    ids = jnp.asarray([[0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    groups = TokenGroups(condition=ids)
    found = lively.compile_quickly(net)(params, x, jnp.stack([t, t], 1), y, groups=groups)
    plain = run(net)(params, x, t, y)
    lively.close(found.heads[1], plain.heads[1])
    lively.close(found.pred[2], plain.pred[2])  # all of its tokens are in one group
    assert np.abs(found.pred[:2] - plain.pred[:2]).min(axis=(1, 2, 3)).max() > 1e-5


# Names, costs and refusals.


@every_family
def test_off_is_the_same_tree_of_the_same_program(family):
    net = network(family, None)
    assert not any("self_conditioning" in path for path in net.axes)
    assert net.settings.tap is None
    assert net.settings == dataclasses.replace(FAMILIES[family][1], self_conditioning=None)


@pytest.mark.parametrize("scaling", ["channels", "scalar", "none"])
def test_its_matrices_are_matrices_of_the_condition(scaling):
    net = network(on=choice(scaling=scaling))
    found = {p: n for p, n in net.axes.items() if p.startswith("self_conditioning")}
    kernels = {path for path in found if axes.is_matrix(found[path])}
    assert kernels == {path for path in found if path.endswith("kernel")}
    assert found["self_conditioning.project.kernel"] == ("embed", "condition")
    leaves = pytree.flatten(lively.abstract(net))
    for path in kernels:
        inputs, outputs = leaves[path].shape
        assert matrix_of(path, leaves[path].shape).published == (outputs, inputs)


def test_its_flops_are_those_of_its_matrices_once_an_image():
    net, plain = network(), network(on=None)
    width, params = net.settings.hidden_size, lively.abstract(net)
    more = 2 * 2 * width**2
    assert flops.forward(net, params) == flops.forward(plain, lively.abstract(plain)) + more
    for depth in (1, 2, 3, 4):
        found = flops.to_block(net, params, depth)
        without = flops.to_block(plain, lively.abstract(plain), depth)
        assert found - without == (more if depth > 2 else 0)


@pytest.mark.slow
def test_a_module_with_it_can_be_tabulated():
    module = network().module(nnx.Rngs(0))
    table = nnx.tabulate(module, *lively.inputs(network()), console_kwargs={"width": 250})
    assert "self_conditioning" in table
    assert f"{pytree.count(lively.abstract(network())):,}" in table


@pytest.mark.parametrize("tap", [4, 9, -1])
def test_a_tap_that_is_no_block_before_the_last_is_refused(tap):
    with pytest.raises(ValueError, match=rf"self_conditioning.tap = {tap}: must lie in 1\.\.3"):
        network(on=choice(tap=tap))


def test_a_single_block_has_no_place_for_it():
    with pytest.raises(ValueError, match="tap = 1: must lie in 1..0, before the last of depth = 1"):
        network(on=choice(tap=None), depth=1, readouts=())


def test_another_scaling_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="scaling = 'time': must be one of channels, scalar, none"):
        choice(scaling="time")
