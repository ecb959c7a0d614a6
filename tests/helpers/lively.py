"""A tiny SiT whose every parameter is drawn, tables and biases included.

At initialisation a SiT outputs zero, which would hide every mistake. Tests of several modules use
this one.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ig_jax.models.network import Network
from ig_jax.models.sit import SiT, SiTSettings

SETTINGS = SiTSettings(
    depth=3,
    hidden_size=24,
    num_heads=3,
    patch_size=2,
    mlp_ratio=2.0,
    qk_norm=False,
    readouts=(2, 1),
    time_scale=1.0,
    dtype="float32",
    remat="none",
    unroll=1,
)
CLASSES = 5


def make(side: int = 4, channels: int = 3, classes: int = CLASSES, **changes) -> Network:
    return Network(SiT, dataclasses.replace(SETTINGS, **changes), side, channels, classes)


def abstract(net: Network):
    return net.abstract_params


def parameters(net: Network):
    """Every leaf N(0, 0.2^2), those that start at zero or are fixed too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), abstract(net)
    )


def inputs(net: Network, batch: int = 3):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((batch, *net.latent_shape)), jnp.float32)
    return x, jnp.asarray(rng.random(batch), jnp.float32), jnp.arange(batch) % (CLASSES + 1)


def compile_quickly(function: Callable) -> Callable:
    """`jax.jit` without optimising: compiling is nearly all of the time of programs this small."""
    return jax.jit(
        function,
        compiler_options={
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        },
    )


@functools.cache
def compiled(net: Network) -> Callable:
    return compile_quickly(functools.partial(net, taps=(1, 3)))


def forward(net: Network, params, *inputs):
    """The network's output with the tokens after blocks 1 and 3."""
    return compiled(net)(params, *inputs)


def close(actual, expected, rtol: float = 1e-5) -> None:
    """Equal up to `rtol` of the largest value, leaf by leaf."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.abs(e).max())


def weighted_sum(net: Network, params):
    """A scalar that every output enters with weights of its own."""
    result = net(params, *inputs(net))
    rng = np.random.default_rng(2)
    draws = [rng.standard_normal(leaf.shape) for leaf in jax.tree.leaves(result)]
    return sum(jnp.sum(w * leaf) for w, leaf in zip(draws, jax.tree.leaves(result), strict=True))
