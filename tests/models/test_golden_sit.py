"""SiT + IG and its loss against the published implementation, from the same randomness."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from vectors import (
    EPSILON,
    Vectors,
    assert_gradients_close,
    assert_within,
    channels_first,
    channels_last,
    from_published,
    objective,
    parameters_of,
    quick_jit,
    sit,
)

from ig_jax.diffusion.flow import Flow
from ig_jax.models import embed, layers
from ig_jax.objectives.base import Draws
from ig_jax.training import step

pytestmark = pytest.mark.golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The combinations of path and time distribution that this directory holds."""
    if "combo" in metafunc.fixturenames:
        combos = parameters_of(metafunc, "sit_loss", lambda v: v.config["combos"])
        metafunc.parametrize("combo", combos, scope="module")


# Forward pass.


@pytest.fixture(scope="module")
def forward(golden_dir):
    """The model of sit_forward, its weights, its inputs and its compiled forward pass."""
    vectors = Vectors(golden_dir, "sit_forward")
    net = sit(vectors.config["model"])
    return SimpleNamespace(
        vectors=vectors,
        net=net,
        params=from_published(net, vectors.weights()),
        x=channels_last(vectors["x"]),
        t=jnp.asarray(vectors["t"]),
        y=jnp.asarray(vectors["y"]),
        depth=net.settings.readouts[0],
        run=quick_jit(partial(net, taps=(1,))),
    )


@pytest.mark.parametrize(("labels", "suffix"), [("y", ""), ("y_null", "_null")])
def test_both_outputs_are_the_published_ones(forward, labels, suffix):
    y = jnp.asarray(forward.vectors[labels])
    out = forward.run(forward.params, forward.x, forward.t, y)
    forward.vectors.assert_close(f"out{suffix}", channels_first(out.pred))
    forward.vectors.assert_close(f"inter{suffix}", channels_first(out.heads[forward.depth]))


def test_both_outputs_of_a_model_with_qk_norm_are_the_published_ones(forward):
    net = sit(forward.vectors.config["qknorm_model"])
    params = from_published(net, forward.vectors.weights("_qknorm"))
    out = quick_jit(net)(params, forward.x, forward.t, forward.y)
    forward.vectors.assert_close("qk_out", channels_first(out.pred))
    forward.vectors.assert_close("qk_inter", channels_first(out.heads[net.settings.readouts[0]]))


def test_training_drops_the_published_labels(forward):
    model = forward.vectors.config["model"]
    loss = objective(forward.run, Flow("linear", "uniform"), model, aux_weight=0.5)
    # Where data and noise are alike, x_t is that array too.
    draws = Draws(forward.t, noise=forward.x, drop=jnp.asarray(forward.vectors["train_drop_u"]))
    p = loss.forward(forward.params, forward.x, forward.y, draws)
    forward.vectors.assert_close("train_labels", p.y)
    forward.vectors.assert_close("train_out", channels_first(p.out.pred))
    forward.vectors.assert_close("train_inter", channels_first(p.out.heads[forward.depth]))


# Pieces of the forward pass: they tell where a difference begins.


def run_module(make, params, *inputs, part=lambda module: module):
    """What `part` of the module that `make` makes gives with these parameters."""
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    nnx.update(module, params)
    return quick_jit(part(module))(*inputs)


def test_position_table_is_the_published_one(forward):
    s = forward.net.settings
    table = embed.position_table(forward.net.side // s.patch_size, s.hidden_size)
    assert_within("pos_embed", table, forward.vectors.weights()["pos_embed"], EPSILON)


def test_patch_embedding_is_the_published_one(forward):
    s, channels = forward.net.settings, forward.net.channels
    make = partial(embed.PatchEmbed, channels, s.hidden_size, s.patch_size, dtype=jnp.float32)
    tokens = run_module(make, forward.params["x_embedder"], forward.x)
    forward.vectors.assert_close("dbg_patch_tokens", tokens)
    forward.vectors.assert_close("dbg_tokens", tokens + forward.params["pos_embed"])


def test_conditioning_is_the_published_one(forward):
    s, classes = forward.net.settings, forward.net.num_classes
    times = partial(embed.TimeEmbed, s.hidden_size, scale=s.time_scale)
    labels = partial(embed.LabelEmbed, classes, s.hidden_size)
    t_emb = run_module(times, forward.params["t_embedder"], forward.t)
    y_emb = run_module(labels, forward.params["y_embedder"], forward.y)
    forward.vectors.assert_close("dbg_t_freq", embed.time_features(forward.t))
    forward.vectors.assert_close("dbg_t_emb", t_emb)
    forward.vectors.assert_close("dbg_c", t_emb + y_emb)


def test_first_block_is_the_published_one(forward):
    out = forward.run(forward.params, forward.x, forward.t, forward.y)
    forward.vectors.assert_close("dbg_block0_out", out.features[1])


def test_attention_of_the_first_block_is_the_published_one(forward):
    s = forward.net.settings
    make = partial(
        layers.Block,
        s.hidden_size,
        s.num_heads,
        s.mlp_ratio,
        s.options,
        dtype=jnp.float32,
    )
    first = jax.tree.map(lambda stack: stack[0], forward.params["blocks"])
    tokens = jnp.asarray(forward.vectors["dbg_tokens"])
    attended = run_module(make, first, tokens, part=lambda b: lambda x: b.attn(b.norm1(x)))
    forward.vectors.assert_close("dbg_block0_attn_of_norm1", attended)


# Loss.


@pytest.fixture(scope="module")
def loss(golden_dir):
    """The model of sit_loss, its weights and its clean batch."""
    vectors = Vectors(golden_dir, "sit_loss")
    net = sit(vectors.config["model"])
    return SimpleNamespace(
        vectors=vectors,
        net=net,
        compiled=jax.jit(net),  # once, with its gradient, for all combinations
        params=from_published(net, vectors.weights()),
        x0=channels_last(vectors["images"]),
        labels=jnp.asarray(vectors["labels"]),
    )


@pytest.fixture(scope="module")
def outcome(loss, combo):
    """What the objective makes of the batch: forward pass, loss of each example, gradients."""
    model, vectors = loss.vectors.config["model"], loss.vectors
    path, times = combo.split("_")
    ig_loss = objective(loss.compiled, Flow(path, times), model, vectors.config["aux_weight"])
    draws = Draws(
        time=jnp.asarray(vectors[f"{combo}__time_draw"]),
        noise=channels_last(vectors[f"{combo}__noise"]),
        drop=jnp.asarray(vectors[f"{combo}__drop_u"]),
    )

    p = ig_loss.forward(loss.params, loss.x0, loss.labels, draws)
    grads, metrics = step.gradients(
        loss.params, step.Noised(loss.x0, loss.labels, draws), objective=ig_loss
    )
    return SimpleNamespace(
        passed=p,
        x_t=ig_loss.process.perturb(loss.x0, draws.noise, p.t),
        each={name: term(p) for name, term in ig_loss.terms.items()},
        metrics=metrics,
        grads=grads,
    )


def test_batch_is_noised_as_published(loss, combo, outcome):
    loss.vectors.assert_close(f"{combo}__t", outcome.passed.t)
    loss.vectors.assert_close(f"{combo}__labels_after_drop", outcome.passed.y)
    loss.vectors.assert_close(f"{combo}__x_t", channels_first(outcome.x_t))
    loss.vectors.assert_close(f"{combo}__target", channels_first(outcome.passed.target))


def test_losses_are_the_published_ones(loss, combo, outcome):
    loss.vectors.assert_close(f"{combo}__denoising_loss", outcome.each["flow"])
    loss.vectors.assert_close(f"{combo}__aux_loss", outcome.each["internal_guidance"])
    loss.vectors.assert_close(f"{combo}__total", outcome.metrics["loss"].value)


def test_every_gradient_is_the_published_one(loss, combo, outcome):
    assert_gradients_close(loss.vectors, loss.net, combo, outcome.grads)
