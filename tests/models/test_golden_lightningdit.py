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
    assert_trees_within,
    assert_within,
    channels_first,
    channels_last,
    from_published,
    lightningdit,
    parameters_of,
    quick_jit,
)

from ig_jax import guidance
from ig_jax.diffusion.flow import Flow
from ig_jax.generation import plan
from ig_jax.guidance import Guidance, Guided
from ig_jax.models import embed, layers
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import Draws, Objective
from ig_jax.samplers import SAMPLERS
from ig_jax.samplers import base as base_sampler
from ig_jax.training import step

pytestmark = pytest.mark.golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The variants of the model that this directory holds."""
    if "variant" in metafunc.fixturenames:
        variants = parameters_of(
            metafunc, "lightningdit_forward", lambda v: v.config["variants"], ("base", "all_off")
        )
        metafunc.parametrize("variant", variants)


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
        shapes = net.abstract_params
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

    forward.vectors.assert_close(
        "rmsnorm_out", run_module(norm, first_block(base)["norm1"], tokens)
    )


def test_the_position_table_is_the_published_one(forward, base):
    s = base.net.settings
    table = embed.position_table(base.net.side // s.patch_size, s.hidden_size)
    assert_within("pos_embed", table, forward.vectors.weights("_base")["pos_embed"], EPSILON)


# Loss.


@pytest.fixture(scope="module")
def loss(golden_dir):
    vectors = Vectors(golden_dir, "lightningdit_loss")
    net = lightningdit(vectors.config["model"])
    return SimpleNamespace(
        vectors=vectors,
        net=net,
        compiled=jax.jit(net),
        params=from_published(net, vectors.weights()),
        x0=channels_last(vectors["x1"]),
        labels=jnp.asarray(vectors["y"]),
    )


@pytest.fixture(scope="module", params=["uniform", "lognorm"])
def outcome(loss, request):
    """The objective on the published batch: forward pass, loss of each example, gradients."""
    times, vectors = request.param, loss.vectors
    # Their time of a draw, 1 - ours: minus the normal draw, one minus the uniform one.
    draw = jnp.asarray(vectors[f"{times}__time_draw"], jnp.float32)
    process, draw = {
        "uniform": (Flow("linear", "uniform"), 1 - draw),
        "lognorm": (Flow("linear", "logit_normal"), -draw),
    }[times]
    terms = {
        "flow": TERMS["flow"](weight=1.0),
        "internal_guidance": TERMS["internal_guidance"](weight=0.5),
        "cosine": TERMS["cosine"](weight=1.0),
    }
    drop = vectors.config["model"].get("class_dropout_prob", 0.1)
    objective = Objective(loss.compiled, process, terms, drop, loss.net.num_classes)
    draws = Draws(
        time=draw,
        noise=channels_last(vectors[f"{times}__x0"]),
        drop=jnp.asarray(vectors[f"{times}__drop_u"]),
    )
    p = objective.forward(loss.params, loss.x0, loss.labels, draws)
    grads, metrics = step.gradients(
        loss.params, step.Noised(loss.x0, loss.labels, draws), objective=objective
    )
    each = {name: term(p) for name, term in terms.items()}
    return SimpleNamespace(
        times=times, vectors=vectors, p=p, each=each, grads=grads, metrics=metrics
    )


def test_the_batch_is_noised_as_published(outcome):
    p, check = outcome.p, outcome.vectors.assert_close
    check(f"{outcome.times}__labels_after_drop", p.y)
    # Turning time round and back costs a last place of 1, which the tolerance of 0 leaves out.
    t = outcome.vectors[f"{outcome.times}__t"]
    assert_within("t", 1 - p.t, t, 2 * EPSILON)
    check(f"{outcome.times}__x_t", channels_first(p.x_t))
    check(f"{outcome.times}__target", -channels_first(p.target))


def test_both_predictions_are_the_published_ones(outcome):
    [early] = outcome.p.out.heads.values()
    outcome.vectors.assert_close(f"{outcome.times}__pred", -channels_first(outcome.p.out.pred))
    outcome.vectors.assert_close(f"{outcome.times}__inter", -channels_first(early))


def test_every_term_of_the_loss_is_the_published_one(outcome):
    each, check = outcome.each, outcome.vectors.assert_close
    check(f"{outcome.times}__loss", each["flow"] + 0.5 * each["internal_guidance"])
    check(f"{outcome.times}__cos_loss", each["cosine"])
    check(f"{outcome.times}__total", outcome.metrics["loss"].value)


def test_every_gradient_is_the_published_one(loss, outcome):
    published = loss.vectors.weights(f"_grads_{outcome.times}")
    # Fixed tables have no published gradient; ours are of no interest, because nothing uses them.
    published["pos_embed"] = np.asarray(outcome.grads["pos_embed"])
    reference = from_published(loss.net, published)
    bound = loss.vectors.bound(f"grads_{outcome.times}")
    assert_trees_within("gradient of", outcome.grads, reference, bound)


# Sampling.


@pytest.fixture(scope="module")
def sampling(golden_dir):
    vectors = Vectors(golden_dir, "lightningdit_sampling")
    net = lightningdit(vectors.config["model"])
    return SimpleNamespace(
        vectors=vectors,
        net=net,
        compiled=jax.jit(net),
        params=from_published(net, vectors.weights()),
        y=jnp.asarray(vectors["y"]),
        z=channels_last(vectors["z"]),
    )


def guidances_of(vectors: Vectors, case: int) -> dict[str, Guidance]:
    """Their CFG starts at a time counted from noise; their IG is on everywhere."""
    cfg = float(vectors["case_cfg_scale"][case]) if vectors["case_mode"][case] == "cfg" else 1.0
    start = float(vectors["case_cfg_interval_start"][case])
    return {
        "ig": Guidance(float(vectors["case_ig_scale"][case]), 0.0, 1.0),
        "cfg": Guidance(cfg, 0.0, 1 - start),
    }


def guided(sampling, params, y, case: int) -> Guided:
    return Guided(
        sampling.compiled,
        params,
        Flow("linear", "uniform"),
        y,
        null_class=sampling.vectors.config["null_label"],
        scales={kind: g.scale for kind, g in guidances_of(sampling.vectors, case).items()},
        channels={},
        readout=sampling.net.settings.readouts[0],
    )


def grid_of(vectors: Vectors, case: int) -> np.ndarray:
    """Our grid of a case: `num_steps` points are one step fewer; a shift of 0 is none."""
    shift = float(vectors["case_shift"][case])
    grid = SAMPLERS["heun2"](vectors.config["num_steps"] - 1).grid()
    return plan.shift_times(grid, 1 / shift if shift else 1.0)


def test_shifted_grids_are_the_published_ones(sampling):
    vectors = sampling.vectors
    for case in range(len(vectors["case_method"])):
        # Theirs is computed in float32.
        assert_within("grid", 1 - grid_of(vectors, case), vectors["t_grid"][case], 2 * EPSILON)


@pytest.mark.slow
def test_fixed_grid_samplers_arrive_where_the_published_ones_do(sampling):
    vectors = sampling.vectors
    for case, method in enumerate(vectors["case_method"]):
        if method == "dopri5":
            continue
        grid, sampler = (
            grid_of(vectors, case),
            SAMPLERS[str(method)](vectors.config["num_steps"] - 1),
        )
        cut = guidance.segments(grid, guidances_of(vectors, case), at_end=sampler.guided_at_end)

        def run(params, z, y, case=case, grid=grid, sampler=sampler, cut=cut):
            fields = guided(sampling, params, y, case).fields(cut)
            return base_sampler.sample(sampler, grid, fields, z, lambda i: jnp.zeros_like(z))

        end = quick_jit(run)(sampling.params, sampling.z, sampling.y)
        bound = vectors.bound("result")
        assert_within(f"case {case}", channels_first(end), vectors["result"][case], bound)
        # They run the null half everywhere: their calls are all of our two passes or one.
        calls = guidance.evaluations(cut, sampler.calls()).network
        doubled = 2 if vectors["case_mode"][case] == "cfg" else 1
        assert vectors["nfe"][case] <= calls <= doubled * vectors["nfe"][case]


@pytest.mark.slow
def test_the_adaptive_sampler_arrives_at_the_exact_solution(sampling):
    """The published one does not: it leaves IG out where it overshoots the end."""
    vectors = sampling.vectors
    cases = np.flatnonzero(vectors["case_method"] == "dopri5")
    for case, exact in zip(cases, vectors["exact_solution_of_dopri5_cases"], strict=True):
        tolerances = {n: float(vectors[f"case_{n}"][case]) for n in ("rtol", "atol")}
        grid, cut = guidance.adaptive_segments(1.0, 0.0, guidances_of(vectors, case))

        def run(params, z, y, settings, case=case, grid=grid, cut=cut):
            fields = guided(sampling, params, y, case).fields(cut)
            sampler = SAMPLERS["dopri5"](200, **settings)
            return base_sampler.sample(sampler, grid, fields, z, lambda i: jnp.zeros_like(z))

        def error(settings, run=run, exact=exact):
            end = jax.jit(partial(run, settings=settings))(sampling.params, sampling.z, sampling.y)
            return np.max(np.abs(channels_first(end) - exact))

        loose, tight = error(tolerances), error({"rtol": 1e-5, "atol": 1e-6})
        assert loose < 5e-4 and tight < 5e-6
