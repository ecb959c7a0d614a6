"""SiT against a plain loop over its parts, and what may and may not change its output; DiT."""

import functools

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from tiers import slow_but

from ig_jax.models import embed, layers
from ig_jax.models.dit import DiT
from ig_jax.models.network import Network


@pytest.fixture(scope="module")
def net():
    return lively.make()


@pytest.fixture(scope="module")
def params(net):
    return lively.parameters(net)


@pytest.fixture(scope="module")
def out(net, params):
    return lively.forward(net, params, *lively.inputs(net))


def filled(module: nnx.Module, params):
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(module, state)
    return module


def by_hand(net: Network, params, x, t, y):
    """Tokens after every block, and what each head makes of them, by a Python loop."""
    s, kinds = net.settings, {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    patches = embed.PatchEmbed(net.channels, s.hidden_size, s.patch_size, **kinds)
    times = embed.TimeEmbed(s.hidden_size, scale=s.time_scale, rngs=nnx.Rngs(0))
    labels = embed.LabelEmbed(net.num_classes, s.hidden_size, rngs=nnx.Rngs(0))
    block = layers.Block(s.hidden_size, s.num_heads, s.mlp_ratio, s.options, **kinds)
    features = s.patch_size**2 * net.channels
    head = layers.FinalLayer(s.hidden_size, features, s.options, layers.zeros, **kinds)

    c = filled(times, params["t_embedder"])(t) + filled(labels, params["y_embedder"])(y)
    tokens = {0: filled(patches, params["x_embedder"])(x) + params["pos_embed"]}
    for i in range(s.depth):
        one = jax.tree.map(lambda stack, i=i: stack[i], params["blocks"])
        tokens[i + 1] = filled(block, one)(tokens[i], c)

    def read(depth: int, head_params):
        return embed.unpatchify(filled(head, head_params)(tokens[depth], c), s.patch_size)

    heads = {d: read(d, params["heads"][f"depth_{d}"]) for d in s.readouts}
    return tokens, heads, read(s.depth, params["final_layer"])


def test_taps_readouts_and_prediction_are_those_of_a_plain_loop_over_the_blocks(net, params, out):
    tokens, heads, pred = lively.compile_quickly(functools.partial(by_hand, net))(
        params, *lively.inputs(net)
    )
    assert set(out.features) == {1, 3} and set(out.heads) == {1, 2}
    lively.close(out.features, {1: tokens[1], 3: tokens[3]})
    lively.close(out.heads, heads)
    lively.close(out.pred, pred)


@pytest.mark.parametrize("depth", slow_but([2], [1, 2]))
def test_several_readouts_at_once_are_each_what_it_is_alone(depth, params, out):
    key = f"depth_{depth}"
    alone = {**params, "heads": {key: params["heads"][key]}}
    single = lively.make(readouts=(depth,))
    other = lively.forward(single, alone, *lively.inputs(single))
    assert set(other.heads) == {depth}
    lively.close(other.heads[depth], out.heads[depth])
    lively.close(other.pred, out.pred)


def test_examples_of_a_batch_do_not_see_each_other(net, params, out):
    order = jnp.array([2, 0, 0])
    picked = lively.forward(net, params, *(value[order] for value in lively.inputs(net)))
    lively.close(picked.pred, out.pred[order])
    lively.close(picked.heads, {d: early[order] for d, early in out.heads.items()})


def test_label_num_classes_reads_the_last_row_of_the_table(net, params):
    table = params["y_embedder"]["table"]["embedding"]
    assert table.shape[0] == lively.CLASSES + 1
    x, t, _ = lively.inputs(net)
    swapped = {**params, "y_embedder": {"table": {"embedding": table[::-1]}}}
    null = lively.forward(net, params, x, t, jnp.full(3, lively.CLASSES))
    lively.close(lively.forward(net, swapped, x, t, jnp.zeros(3, int)), null, rtol=1e-6)
    assert np.any(
        np.abs(lively.forward(net, params, x, t, jnp.zeros(3, int)).pred - null.pred) > 1e-2
    )


def test_time_scale_multiplies_the_time(params, net):
    x, t, y = lively.inputs(net)
    lively.close(
        lively.forward(lively.make(time_scale=8.0), params, x, t / 8, y),
        lively.forward(net, params, x, t, y),
    )


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_length_of_queries_and_keys_matters_only_without_their_norm(qk_norm):
    net = lively.make(qk_norm=qk_norm)
    params = lively.parameters(net)
    longer = np.array([10, 10, 1], np.float32)[:, None, None]
    qkv = jax.tree.map(lambda leaf: np.asarray(leaf) * longer, params["blocks"]["attn"]["qkv"])
    blocks = {**params["blocks"], "attn": {**params["blocks"]["attn"], "qkv": qkv}}
    plain, scaled = (
        lively.forward(net, p, *lively.inputs(net)).pred
        for p in (params, {**params, "blocks": blocks})
    )
    change = np.abs(plain - scaled).max() / np.abs(plain).max()
    assert change < 1e-3 if qk_norm else change > 1e-2


def test_bfloat16_moves_the_result_by_its_rounding(params, out):
    half = lively.make(dtype="bfloat16")
    for rounded, exact in zip(
        jax.tree.leaves(lively.forward(half, params, *lively.inputs(half))),
        jax.tree.leaves(out),
        strict=True,
    ):
        assert 1e-4 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.05


def test_bfloat16_leaves_parameters_gradients_and_outputs_float32(params):
    half = lively.make(dtype="bfloat16")
    loss = functools.partial(lively.weighted_sum, half)
    outside = [
        lively.abstract(half),
        jax.eval_shape(functools.partial(half, taps=(1,)), params, *lively.inputs(half)),
        jax.eval_shape(jax.grad(loss), params),
    ]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(outside)} == {"float32"}


def matrix_products(jaxpr) -> list[str]:
    """Types of the left operands of all matrix products, those inside of loops and calls too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(str(equation.invars[0].aval.dtype))
        for inner in core.jaxprs_in_params(equation.params):
            found += matrix_products(inner)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_time_embedding_multiplies_in_float32_whatever_the_compute_type(dtype, params):
    net = lively.make(dtype=dtype)
    products = matrix_products(jax.make_jaxpr(net)(params, *lively.inputs(net)).jaxpr)
    # Patches; qkv, two of attention, projection, MLP, modulation of one block; three heads' two.
    assert products.count(dtype) == (1 + 7 + 3 * 2) + (2 if dtype == "float32" else 0)
    assert products.count("float32") >= 2 and len(products) == 16


def test_times_that_bfloat16_cannot_tell_apart_stay_distinct():
    half = lively.make(dtype="bfloat16")
    x, _, y = lively.inputs(half)
    near, nearer = (
        lively.forward(half, lively.parameters(half), x, jnp.full(3, t), y) for t in (0.9985, 0.999)
    )
    assert np.any(near.pred != nearer.pred)


# DiT: the heads of a SiT, twice as wide.


@pytest.fixture(scope="module")
def dit(net):
    return Network(DiT, net.settings, net.side, net.channels, net.num_classes)


def halves(net: Network, params):
    """The outputs of every head, each leaf [..., pixel of a patch, noise or variance, channel]."""
    heads = {**params["heads"], "final_layer": params["final_layer"]}
    pixels = net.settings.patch_size**2
    return {
        name: jax.tree.map(lambda leaf: leaf.reshape(-1, pixels, 2, net.channels), head["linear"])
        for name, head in heads.items()
    }


def test_a_dit_predicts_what_a_sit_with_its_noise_rows_does(net, dit):
    params = lively.parameters(dit)
    noise = jax.tree.map(lambda leaf: leaf[:, :, 0], halves(dit, params))

    def narrow(name, head):
        linear = {
            "kernel": noise[name]["kernel"].reshape(net.settings.hidden_size, -1),
            "bias": noise[name]["bias"].reshape(-1),
        }
        return {**head, "linear": linear}

    heads = {name: narrow(name, head) for name, head in params["heads"].items()}
    final = narrow("final_layer", params["final_layer"])
    same = {**params, "heads": heads, "final_layer": final}
    expected = lively.forward(net, same, *lively.inputs(net))
    found = lively.forward(dit, params, *lively.inputs(dit))
    assert expected.variance is None
    lively.close(found.replace(variance=None), expected, rtol=1e-6)


def test_a_dit_predicts_the_variance_that_a_sit_with_its_variance_rows_does(dit):
    params = lively.parameters(dit)
    rows = jax.tree.map(lambda leaf: leaf[:, :, 1], halves(dit, params))["final_layer"]
    linear = {
        "kernel": rows["kernel"].reshape(dit.settings.hidden_size, -1),
        "bias": rows["bias"].reshape(-1),
    }
    sit = lively.make(readouts=())
    same = {name: leaf for name, leaf in params.items() if name != "heads"}
    same["final_layer"] = {**params["final_layer"], "linear": linear}
    found = lively.forward(dit, params, *lively.inputs(dit))
    expected = lively.forward(sit, same, *lively.inputs(sit))
    assert found.variance.dtype == jnp.float32
    lively.close(found.variance, expected.pred, rtol=1e-6)


class Noise(Network):
    """What a DiT predicts but the variance."""

    def __call__(self, *args, **options):
        return super().__call__(*args, **options).replace(variance=None)


@pytest.mark.slow
def test_a_dit_holds_its_variance_rows_without_reading_them_for_the_noise(dit):
    params = lively.parameters(dit)
    noise = Noise(dit.family, dit.settings, dit.side, dit.channels, dit.num_classes)
    gradient = jax.grad(functools.partial(lively.weighted_sum, noise))
    grads = lively.compile_quickly(gradient)(params)
    for name, head in halves(dit, grads).items():
        for leaf in head.values():
            assert np.all(leaf[:, :, 0] != 0) and not np.any(leaf[:, :, 1]), name


@pytest.mark.parametrize("dtype", slow_but([jnp.float32], [jnp.float32, jnp.bfloat16]))
def test_gelu_and_its_derivative_are_the_tanh_approximation_to_rounding(dtype):
    """Also far out, where an exponential overflows. The sum's derivative is each element's."""
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, -200.0, 200.0, 1e4]])
    given = jnp.asarray(x, dtype)
    wide = np.asarray(given, np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * wide**2)
    value = wide / 2 * (1 + np.tanh(inner))
    derivative = (1 + np.tanh(inner)) / 2 + wide / 2 * (1 - np.tanh(inner) ** 2) * slope
    found = jax.grad(lambda x: layers.gelu(x).sum())(given)
    assert layers.gelu(given).dtype == found.dtype == dtype
    # The value is computed in the type of x, the derivative in float32 and then rounded.
    tolerances = {jnp.float32: (4e-6, 4e-6), jnp.bfloat16: (2e-2, 4e-3)}[dtype]
    both = ((layers.gelu(given), value), (found, derivative))
    for (ours, exact), tolerance in zip(both, tolerances, strict=True):
        apart = np.abs(np.asarray(ours, np.float64) - exact)
        assert np.all(apart <= tolerance * np.maximum(np.abs(exact), 1))
