"""LightningDiT + IG and its loss against the published implementation, from the same randomness.

The published code counts time from noise to data: its t is our 1 - t, its velocity minus ours.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from vectors import (
    EPSILON,
    Vectors,
    assert_within,
    channels_first,
    channels_last,
    from_published,
    lightningdit,
    quick_jit,
)

from ig_jax.models import embed, layers

pytestmark = pytest.mark.golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The variants of the model that this directory holds."""
    if "variant" in metafunc.fixturenames:
        vectors = Vectors(metafunc.config.getoption("--golden"), "lightningdit_forward")
        metafunc.parametrize("variant", vectors.config["variants"])


@pytest.fixture(scope="module")
def forward(golden_dir):
    vectors = Vectors(golden_dir, "lightningdit_forward")
    return SimpleNamespace(
        vectors=vectors,
        x=channels_last(vectors["x"]),
        t=1 - jnp.asarray(vectors["t"]),
        y=jnp.asarray(vectors["y"]),
    )


@pytest.fixture(scope="module")
def base(forward):
    """The shipped recipe in miniature."""
    net = lightningdit(forward.vectors.config["variants"]["base"])
    params = from_published(net, forward.vectors.weights("_base"))
    return SimpleNamespace(net=net, params=params, options=net.settings.options)


def test_both_outputs_are_the_published_ones_with_their_sign_turned(forward, variant):
    net = lightningdit(forward.vectors.config["variants"][variant])
    params = from_published(net, forward.vectors.weights(f"_{variant}"))
    out = quick_jit(net)(params, forward.x, forward.t, forward.y)
    [early] = out.heads.values()
    forward.vectors.assert_close(f"{variant}__out", -channels_first(out.pred))
    forward.vectors.assert_close(f"{variant}__inter", -channels_first(early))


def test_a_gated_mlp_is_as_wide_as_the_published_one(forward):
    widths = forward.vectors.config["swiglu_hidden"]
    for variant, width in widths.items():
        net = lightningdit(forward.vectors.config["variants"][variant])
        shapes = jax.eval_shape(net.init, jax.random.key(0))
        assert shapes["blocks"]["mlp"]["w3"]["kernel"].shape[1] == width


# Pieces of the forward pass: they tell where a difference begins.


def run_module(make, params, *inputs):
    """What the module that `make` makes gives with these parameters."""
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    nnx.update(module, params)
    return quick_jit(module)(*inputs)


def first_block(base):
    return jax.tree.map(lambda stack: stack[0], base.params["blocks"])


def test_the_rotation_is_the_published_one(forward):
    heads_last = jnp.asarray(np.swapaxes(forward.vectors["rope_in"], 1, 2))
    forward.vectors.assert_close("rope_out", np.swapaxes(layers.rotate(heads_last), 1, 2))


def test_conditioning_is_the_published_one(forward, base):
    s = base.net.settings
    times = partial(embed.TimeEmbed, s.hidden_size, scale=s.time_scale)
    labels = partial(embed.LabelEmbed, base.net.num_classes, s.hidden_size)
    t_emb = run_module(times, base.params["t_embedder"], 1 - forward.t)
    y_emb = run_module(labels, base.params["y_embedder"], forward.y)
    forward.vectors.assert_close("dbg_c", t_emb + y_emb)


def test_tokens_and_the_first_block_are_the_published_ones(forward, base):
    s = base.net.settings
    patches = partial(
        embed.PatchEmbed, base.net.channels, s.hidden_size, s.patch_size, dtype=jnp.float32
    )
    tokens = run_module(patches, base.params["x_embedder"], forward.x)
    forward.vectors.assert_close("dbg_tokens", tokens + base.params["pos_embed"])
    out = quick_jit(partial(base.net, taps=(1,)))(base.params, forward.x, forward.t, forward.y)
    forward.vectors.assert_close("dbg_block0_out", out.features[1])


def test_the_gated_mlp_and_the_norm_are_the_published_ones(forward, base):
    s, tokens = base.net.settings, jnp.asarray(forward.vectors["dbg_tokens"])
    gated = partial(layers.mlp, s.hidden_size, s.mlp_ratio, base.options, dtype=jnp.float32)
    forward.vectors.assert_close("swiglu_out", run_module(gated, first_block(base)["mlp"], tokens))

    def norm(rngs):
        return layers.norm(s.hidden_size, base.options, rngs)

    forward.vectors.assert_close("rmsnorm_out", run_module(norm, first_block(base)["norm1"], tokens))


def test_the_position_table_is_the_published_one(forward, base):
    s = base.net.settings
    table = embed.position_table(base.net.side // s.patch_size, s.hidden_size)
    assert_within("pos_embed", table, forward.vectors.weights("_base")["pos_embed"], EPSILON)
