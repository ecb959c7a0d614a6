"""FLOPs on paper against the traced program and against XLA; peaks of chips by name."""

import ast
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import lively
import pytest

from ig_jax.diffusion.flow import Flow
from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.models.sit import SiT, SiTSettings
from ig_jax.monitoring import flops, peak_flops
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import Objective
from ig_jax.optim.train_state import trained

WIDE = {
    "depth": 3,
    "hidden_size": 256,
    "num_heads": 4,
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "qk_norm": True,
    "readouts": (1,),
    "time_scale": 1.0,
    "dtype": "float32",
    "remat": "none",
    "unroll": 3,
}
OPTIONS = {"swiglu": True, "rope": True, "rms_norm": True, "shift": True}
NETS = {
    "sit": Network(SiT, SiTSettings(**WIDE | {"readouts": (2, 1)}), 16, 4, 10),
    "lightningdit": Network(LightningDiT, LightningDiTSettings(**WIDE, **OPTIONS), 16, 8, 10),
    "dit": Network(DiT, SiTSettings(**WIDE | {"readouts": ()}), 16, 4, 10),
}
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


def arguments(net, batch: int = 1):
    """Abstract (params, x, t, y)."""
    of = jax.ShapeDtypeStruct
    x, t = of((batch, *net.latent_shape), jnp.float32), of((batch,), jnp.float32)
    return lively.abstract(net), x, t, of((batch,), jnp.int32)


def inner_programs(eqn) -> list:
    """Those that an operation of a traced program runs: a jitted function, the body of a scan."""
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns"))
    return [getattr(value, "jaxpr", value) for value in values if hasattr(value, "eqns")]


def of_products(program) -> int:
    """FLOPs of every product of matrices and every convolution of a traced program."""
    total = 0
    for eqn in program.eqns:
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(shapes[-1]) * math.prod(shapes[0][i] for i in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            *window, inputs, _ = shapes[1]
            total += 2 * math.prod(shapes[-1]) * math.prod(window) * inputs
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(map(of_products, inner_programs(eqn)))
    return total


@every_net
def test_the_count_is_that_of_the_products_in_the_traced_network(net):
    traced = jax.make_jaxpr(functools.partial(net, taps=()))(*arguments(net))
    assert flops.forward(net, lively.abstract(net)) == of_products(traced.jaxpr)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_teacher_computes_no_block_behind_the_one_whose_tokens_are_asked_for(depth):
    """And no head: the products in its traced program are those on paper."""
    net = NETS["sit"]
    traced = jax.make_jaxpr(functools.partial(net.tokens, depths=(depth,)))(*arguments(net))
    assert flops.to_block(net, lively.abstract(net), depth) == of_products(traced.jaxpr)


def test_the_loss_of_self_alignment_adds_its_head_and_the_teachers_blocks_to_a_forward_pass():
    net, key = NETS["sit"], jax.random.key(0)
    loss = Objective(
        net=net,
        process=Flow("linear", "uniform"),
        terms={"flow": TERMS["flow"](1.0), "self_alignment": TERMS["self_alignment"](0.5, 1, 2)},
        label_drop=0.1,
        null_class=net.num_classes,
    )
    params, (_, x, _, y) = lively.abstract(net), arguments(net)
    terms = jax.eval_shape(loss.init, key)
    draws = jax.eval_shape(loss.draw, key, x)
    traced = jax.make_jaxpr(loss)(trained(params, terms), x, y, draws, params)
    whole = flops.of_train_step(net, params, 1, terms, loss.teacher_passes)
    gradient = flops.of_train_step(net, params, 1, terms)
    assert loss.teacher_passes == (2,)
    assert of_products(traced.jaxpr) == gradient // 3 + whole - gradient


@every_net
def test_xla_counts_up_to_three_percent_more_with_what_is_not_a_product(net):
    counted = jax.jit(net).lower(*arguments(net)).cost_analysis()["flops"]
    assert 1 < counted / flops.forward(net, lively.abstract(net)) < 1.03


@every_net
def test_a_gradient_costs_three_forward_passes_an_image(net):
    params = lively.abstract(net)
    assert flops.of_train_step(net, params, 7) == 21 * flops.forward(net, params)


def test_xla_counts_nearly_three_forward_passes_in_a_gradient_without_rematerialisation():
    """A little less: nothing needs the gradient of the latents and of the time features."""
    net = NETS["sit"]
    args = arguments(net, batch=2)
    loss = lambda *args: sum(x.sum() for x in jax.tree.leaves(net(*args)))  # noqa: E731
    counted = jax.jit(jax.grad(loss)).lower(*args).cost_analysis()["flops"]
    assert 0.97 < counted / flops.of_train_step(net, lively.abstract(net), 2) < 1.03


def of_sit(side: int = 4, **changes) -> int:
    net = lively.make(side=side, **changes)
    return flops.forward(net, lively.abstract(net))


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"unroll": 3}, {"dtype": "bfloat16"}])
def test_how_a_network_is_run_does_not_change_its_count(changes):
    assert of_sit(**changes) == of_sit()


def test_every_block_costs_the_same():
    at = [of_sit(depth=depth) for depth in (3, 4, 7)]
    assert at[1] - at[0] > 0
    assert at[2] - at[1] == 3 * (at[1] - at[0])


def test_attention_is_the_only_part_that_grows_with_the_square_of_the_tokens():
    """a + b n + c n^2 through n = 4, 16 and 64 tokens: c is 4 depth hidden_size."""
    tokens = (4, 16, 64)
    at = [of_sit(side=2 * math.isqrt(n)) for n in tokens]
    slopes = [(at[i + 1] - at[i]) / (tokens[i + 1] - tokens[i]) for i in (0, 1)]
    settings = lively.SETTINGS
    assert (slopes[1] - slopes[0]) / (64 - 4) == 4 * settings.depth * settings.hidden_size


# What is printed, in bfloat16 TFLOP/s, and by how much that is too much for one device: vendors
# print numbers "with sparsity", and of a whole chip where JAX counts two devices.
SPARSE, TWO_DEVICES = 2, 2
DATA_SHEETS = {
    "TPU v2": (45, TWO_DEVICES),
    "TPU v3": (123, TWO_DEVICES),
    "TPU v4": (275, 1),
    "TPU v5 lite": (197, 1),
    "TPU v5e": (197, 1),
    "TPU v5": (459, 1),  # v5p
    "TPU v5p": (459, 1),
    "TPU v6 lite": (918, 1),
    "TPU v6e": (918, 1),
    "TPU7x": (2307, TWO_DEVICES),
    "NVIDIA B200": (4500, SPARSE),
    "NVIDIA GB200": (5000, SPARSE),
    "NVIDIA H200": (1979, SPARSE),
    "NVIDIA H200 NVL": (1671, SPARSE),
    "NVIDIA GH200 480GB": (1979, SPARSE),
    "NVIDIA GH200 120GB": (1979, SPARSE),
    "NVIDIA H100 80GB HBM3": (1979, SPARSE),
    "NVIDIA H100 NVL": (1671, SPARSE),
    "NVIDIA H100 PCIe": (1513, SPARSE),
    "NVIDIA A100-SXM4-40GB": (624, SPARSE),
    "NVIDIA A100-SXM4-80GB": (624, SPARSE),
    "NVIDIA A100-PCIE-40GB": (624, SPARSE),
    "NVIDIA A100 80GB PCIe": (624, SPARSE),
    "NVIDIA L4": (242, SPARSE),
    "NVIDIA L40": (362.1, SPARSE),
    "NVIDIA L40S": (724.1, SPARSE),
    "NVIDIA A10": (250, SPARSE),
    "NVIDIA A10G": (140, SPARSE),
    "NVIDIA A30": (330, SPARSE),
    "NVIDIA A40": (299.4, SPARSE),
    "NVIDIA GeForce RTX 3090": (142, SPARSE),
    "NVIDIA GeForce RTX 4090": (330.4, SPARSE),
    "NVIDIA GeForce RTX 5090": (419, SPARSE),
    "Tesla V100-SXM2-16GB": (125, 1),
    "Tesla V100-SXM2-32GB": (125, 1),
    "Tesla V100-PCIE-16GB": (112, 1),
    "Tesla V100-PCIE-32GB": (112, 1),
    "Tesla T4": (65, 1),
}


@pytest.mark.parametrize("device_kind", DATA_SHEETS)
def test_a_known_chip_has_the_dense_peak_of_its_data_sheet(device_kind):
    printed, too_much = DATA_SHEETS[device_kind]
    assert peak_flops.peak_flops(device_kind) == pytest.approx(printed / too_much * 1e12, rel=3e-4)


@pytest.mark.parametrize(
    "device_kind",
    ["cpu", "", "TPU", "TPU v9", "NVIDIA", "NVIDIA H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_a_chip_that_is_not_listed_has_no_peak(device_kind):
    assert peak_flops.peak_flops(device_kind) is None


def test_the_device_of_these_tests_has_no_peak():
    assert peak_flops.peak_flops(jax.devices()[0].device_kind) is None


def test_every_chip_is_held_to_its_data_sheet_and_none_is_listed_twice():
    """In a dictionary the later row would win without a word."""
    (table,) = (
        n for n in ast.walk(ast.parse(inspect.getsource(peak_flops))) if isinstance(n, ast.Dict)
    )
    names = [key.value for key in table.keys]
    assert sorted(names) == sorted(DATA_SHEETS)


def test_a_count_is_told_in_the_largest_unit_that_it_fills():
    told = {100_100_000_000_000: "100 TFLOP", 237e9: "237 GFLOP", 1_770_000: "1.77 MFLOP", 5e4: ""}
    for count, words in told.items():
        assert flops.in_words(int(count)) == (words or "0.05 MFLOP")
