"""The three families as Flax modules, and against their functional form."""

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
from ig_jax.models import axes, layers
from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.sit import SiT

LIGHT = LightningDiTSettings(
    **dataclasses.asdict(lively.SETTINGS), swiglu=True, rope=True, rms_norm=True, shift=True
)
FAMILIES = {"sit": (SiT, lively.SETTINGS), "dit": (DiT, lively.SETTINGS)}
FAMILIES["lightningdit"] = (LightningDiT, LIGHT)
every_family = pytest.mark.parametrize("family", FAMILIES)
one_family = pytest.mark.parametrize("family", slow_but(["dit"], FAMILIES))


def functional(family: str, **changes) -> Network:
    module, settings = FAMILIES[family]
    return Network(module, dataclasses.replace(settings, **changes), 4, 3, lively.CLASSES)


def with_parameters(net: Network, params) -> nnx.Module:
    module = net.module(nnx.Rngs(0))
    state = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(module, state)
    return module


def same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def loss(module, *inputs):
    out = module(*inputs, taps=(1, 3))
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out)), out


@one_family
def test_a_module_and_its_functional_form_agree_in_every_bit(family):
    net = functional(family)
    params, inputs = lively.parameters(net), lively.inputs(net)

    def of_params(params, *inputs):
        return loss(functools.partial(net, params), *inputs)

    (_, out), grads = jax.jit(jax.value_and_grad(of_params, has_aux=True))(params, *inputs)
    module = with_parameters(net, params)
    (_, same), of_module = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(module, *inputs)
    assert set(out.heads) == {1, 2} and set(out.features) == {1, 3}
    assert (out.variance is None) == (family != "dit")
    same_bits(out, same)
    same_bits(grads, nnx.to_pure_dict(of_module))


@every_family
def test_parameters_of_a_key_are_those_of_a_module_that_is_given_it(family):
    net = functional(family)
    of_rngs = nnx.state(net.module(nnx.Rngs(7)), nnx.Param)
    same_bits(net.init(nnx.Rngs(7).params()), nnx.to_pure_dict(of_rngs))


def test_one_stream_makes_different_networks_one_after_the_other():
    rngs, net = nnx.Rngs(0), functional("sit")
    one, two = (net.module(rngs).blocks.mlp.fc1.kernel[...] for _ in range(2))
    assert np.all(one != two)


@one_family
def test_a_key_is_split_into_that_of_the_blocks_and_that_of_the_rest(family):
    """So parameters of a seed stay what they were in older runs."""
    net, key = functional(family), jax.random.key(3)
    fresh, s = net.init(key), net.settings
    outer, of_blocks = jax.random.split(key)
    for i, one in enumerate(jax.random.split(of_blocks, s.depth)):
        sizes = (s.hidden_size, s.num_heads, s.mlp_ratio, s.options)
        alone = layers.Block(*sizes, dtype=jnp.float32, rngs=nnx.Rngs(one))
        stacked = jax.tree.map(lambda leaf, i=i: leaf[i], fresh["blocks"])
        lively.close(stacked, nnx.to_pure_dict(nnx.state(alone, nnx.Param)), rtol=1e-6)
    shape = fresh["x_embedder"]["proj"]["kernel"].shape
    drawn = layers.xavier_flat(nnx.Rngs(outer).params(), shape)
    lively.close(fresh["x_embedder"]["proj"]["kernel"], drawn, rtol=1e-6)


@every_family
def test_the_tree_has_one_stack_a_matrix_of_the_blocks_in_float32(family):
    net = functional(family)
    leaves = pytree.flatten(lively.abstract(net))
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"float32"}
    stacks = {path for path in leaves if pytree.is_stack(path)}
    assert stacks and all(leaves[path].shape[0] == net.settings.depth for path in stacks)
    assert set(net.axes) == set(leaves)


@one_family
def test_a_module_can_be_tabulated_and_displayed(family, capsys):
    net = functional(family)
    module = net.module(nnx.Rngs(0))
    table = nnx.tabulate(module, *lively.inputs(net), console_kwargs={"width": 250})
    assert f"{FAMILIES[family][0].__name__} Summary" in table
    assert "final_layer" in table and f"{pytree.count(lively.abstract(net)):,}" in table
    nnx.display(module)
    shown = capsys.readouterr().out
    assert "blocks=Block(" in shown and "axis_names=('layers', 'embed', 'qkv'" in shown


# Names of axes.


@every_family
@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_axis_of_every_parameter_has_a_name(family, qk_norm):
    net = functional(family, qk_norm=qk_norm)
    leaves = pytree.flatten(lively.abstract(net))
    assert net.axes.keys() == leaves.keys()
    sizes: dict[str, set[int]] = {}
    for path, names in net.axes.items():
        assert len(names) == len(leaves[path].shape) and set(names) <= axes.NAMES
        assert (names[0] == axes.LAYERS) == pytree.is_stack(path)
        for name, size in zip(names, leaves[path].shape, strict=True):
            sizes.setdefault(name, set()).add(size)
    several = {name for name, found in sizes.items() if len(found) > 1}
    assert several <= {"modulation"}  # of a block and of a head


@every_family
def test_the_matrices_are_the_kernels_and_the_label_table(family):
    names = functional(family).axes
    found = {path for path in names if axes.is_matrix(names[path])}
    assert found == {path for path in names if path.endswith(("kernel", "embedding"))}


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("final_layer.linear.kernel", ("embed", "patch_values")),
        ("opt_state.inner.mu.final_layer.linear.kernel", ("embed", "patch_values")),
        ("ema.0.9999.blocks.mlp.fc1.bias", ("layers", "mlp")),
        ("step", None),
        ("other.linear.kernel", None),
    ],
)
def test_a_leaf_of_a_state_belongs_to_the_parameter_its_path_ends_in(path, names):
    assert axes.names_of(functional("sit").axes, path) == names


def test_an_axis_name_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match="'embd' names no axis: add .* mlp, modulation"):
        axes.axis_metadata("embd", "mlp")


@pytest.mark.parametrize("metadata", [{}, axes.axis_metadata("embed")])
def test_a_parameter_whose_axes_are_not_all_named_is_named(metadata):
    module = nnx.Dict(gate=nnx.Linear(2, 3, kernel_metadata=metadata, rngs=nnx.Rngs(0)))
    del module["gate"].bias
    with pytest.raises(ValueError, match=r"the parameter gate\.kernel \[2, 3\] has .* each of its"):
        axes.of_module(module)
