"""Dual-time scheduling and attention separation against the published implementation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but
from vectors import (
    DISTANCE_OF,
    Vectors,
    assert_gradients_close,
    assert_within,
    channels_first,
    channels_last,
    from_published,
    parameters_of,
    quick_jit,
    sit,
)

from ig_jax import guidance
from ig_jax.diffusion.flow import Flow
from ig_jax.guidance import Guidance, Guided
from ig_jax.models import embed
from ig_jax.objectives import TERMS, heads
from ig_jax.objectives.base import Draws, Objective
from ig_jax.objectives.self_alignment import SelfAlignment
from ig_jax.objectives.token_groups import GroupSettings, SamplingGroups, by_group, of_each_token
from ig_jax.optim.train_state import parted
from ig_jax.samplers import SAMPLERS, base
from ig_jax.training.step import Noised, gradients
from ig_jax.types import TokenGroups

pytestmark = pytest.mark.golden

TERM = "self_alignment"
QUICK = ("shipped",)  # cases that are not slow


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        name = "with_gradients" if "gradient" in metafunc.function.__name__ else "cases"
        cases = parameters_of(metafunc, "dts_as", lambda v: v.config[name], QUICK)
        metafunc.parametrize("case", cases, scope="module")
    if "number" in metafunc.fixturenames:
        masks = parameters_of(
            metafunc, "dts_as", lambda v: range(len(v.config["mask_ratio_cases"]))
        )
        metafunc.parametrize("number", masks)
    if "sampled_case" in metafunc.fixturenames:
        cases = parameters_of(
            metafunc, "dts_as_sampling", lambda v: range(len(v["case_method"])), (2, 3)
        )
        metafunc.parametrize("sampled_case", cases)


def shares_of(ratio) -> tuple[float, ...]:
    """The published mask_ratio as shares: one number is a share of two groups, zeros are none."""
    if len(ratio) == 1:
        return (ratio[0], 1 - ratio[0]) if 0 < ratio[0] < 1 else ()
    return tuple(float(r) for r in ratio if r)


@pytest.fixture(scope="module")
def golden(golden_dir):
    v = Vectors(golden_dir, "dts_as")
    net = sit(v.config["model"])
    return SimpleNamespace(
        vectors=v,
        net=net,
        student=from_published(net, v.weights("_student")),
        teacher=parted(from_published(net, v.weights("_teacher")))[0],
        tap=v.config["block_out_t"],
        patch=v.config["model"]["patch_size"],
    )


# Groups.


def test_groups_are_drawn_as_published(golden, number):
    v = golden.vectors
    shares = shares_of(v.config["mask_ratio_cases"][number])
    groups = GroupSettings(shares)
    draws = (jnp.asarray(v["mask_u"]), jnp.asarray(v["full_u"]))
    if f"mask{number}__group_ids" not in v.arrays:
        assert groups.count == 1 and groups.ids(()) is None
        return
    np.testing.assert_array_equal(groups.sizes(v["mask_u"].shape[1]), v[f"mask{number}__counts"][0])
    np.testing.assert_array_equal(groups.ids(draws), v[f"mask{number}__group_ids"])
    np.testing.assert_allclose(np.array(shares) / sum(shares), v[f"mask{number}__ratios"])


# Forward pass.


def mixed(golden, name: str, ids) -> jax.Array:
    """Latents of which each token is that of its group's copy."""
    copies = channels_last(golden.vectors[name])
    each = copies.reshape(-1, len(ids), *copies.shape[1:])
    count = jnp.broadcast_to(jnp.arange(len(each), dtype=jnp.float32), (len(ids), len(each)))
    return by_group(lambda t: jnp.take(each, jnp.int32(t[0]), axis=0), count, ids)


def test_a_time_and_a_label_for_each_token_give_the_published_outputs(golden):
    v, (params, _) = golden.vectors, parted(golden.student)
    x, y = channels_last(v["x"]), jnp.asarray(v["y"])
    run = quick_jit(
        lambda *a, groups=None: golden.net(params, *a, taps=(golden.tap,), groups=groups)
    )
    out = run(x, jnp.asarray(v["t"]), y)
    v.assert_close("fwd_out", channels_first(out.pred))
    v.assert_close("fwd_features", out.features[golden.tap])
    v.assert_close("fwd_tokens", embed.patchify(out.pred, golden.patch))
    ids = jnp.broadcast_to(jnp.arange(v["t_tokens"].shape[1]), v["t_tokens"].shape)
    own = TokenGroups(condition=ids)
    out = run(x, jnp.asarray(v["t_tokens"]), jnp.asarray(v["y_tokens"]), groups=own)
    v.assert_close("token_out", channels_first(out.pred))
    v.assert_close("token_features", out.features[golden.tap])


@pytest.mark.parametrize("count", slow_but([3], [2, 3]))
@pytest.mark.parametrize("kind", slow_but(["sep"], ["sep", "full"]))
def test_separated_attention_gives_the_published_outputs(golden, count, kind):
    v, (params, _) = golden.vectors, parted(golden.student)
    ids = jnp.asarray(v[f"group_ids{count}"])
    own = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    groups = TokenGroups(condition=own, attention=ids if kind == "sep" else None)
    inputs = mixed(golden, f"x_groups{count}", ids), jnp.asarray(v["t_tokens"]), jnp.asarray(v["y"])
    run = quick_jit(lambda *a: golden.net(params, *a, taps=(golden.tap,), groups=groups))
    out = run(*inputs)
    v.assert_close(f"mix{count}_{kind}_out", channels_first(out.pred))
    v.assert_close(f"mix{count}_{kind}_features", out.features[golden.tap])


@pytest.mark.slow
def test_separation_without_times_of_groups_and_with_qk_norm_is_the_published(golden):
    v, (params, _) = golden.vectors, parted(golden.student)
    ids, y, t = (jnp.asarray(v[n]) for n in ("group_ids2", "y", "t"))
    x, apart = mixed(golden, "x_groups2", ids), TokenGroups(attention=ids)
    out = quick_jit(lambda: golden.net(params, x, t, y, groups=apart))()
    v.assert_close("mix2_sep_onetime_out", channels_first(out.pred))
    net = sit(v.config["qknorm_model"] | {"qk_norm": True})
    weights, _ = parted(from_published(net, v.weights("_qknorm")))
    out = quick_jit(lambda: net(weights, channels_last(v["x"]), t, y))()
    v.assert_close("qk_out", channels_first(out.pred))
    own = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    groups = TokenGroups(condition=own, attention=ids)
    out = quick_jit(lambda: net(weights, x, jnp.asarray(v["t_tokens"]), y, groups=groups))()
    v.assert_close("qk_mix2_sep_out", channels_first(out.pred))


# Loss.


def objective(golden, case: str) -> tuple[Objective, Draws]:
    v, c = golden.vectors, golden.vectors.config
    settings = c["cases"][case]
    shares = shares_of(settings["mask_ratio"])
    groups = GroupSettings(
        shares,
        dual_time=bool(settings["dual"]) and len(shares) > 1,
        separate_attention=bool(settings["sep"]) and len(shares) > 1,
        full_sample_prob=settings["full_prob"],
    )
    odd = settings["teacher_t"] == "self_flow" and settings["teacher_mask"] and groups.count > 1
    alignment = SelfAlignment(
        c["align_weight"],
        c["block_out_s"],
        c["block_out_t"],
        max_interval=c["teacher_interval"],
        distance=DISTANCE_OF[settings["loss"]],
        teacher_time=settings["teacher_t"] + "_clean" * odd,
        teacher_groups=bool(settings["teacher_mask"]),
        teacher_labels="given",
    )
    alignment.check_groups(groups)
    lognormal = settings["weighting"] == "lognormal"
    law = {"time_mean": c["lognormal"]["mean"], "time_std": c["lognormal"]["std"]}
    loss = Objective(
        net=golden.net,
        process=Flow(settings["path"], settings["weighting"], **law if lognormal else {}),
        terms={"flow": TERMS["flow"](1.0)} | ({TERM: alignment} if settings["align"] else {}),
        label_drop=c["label_drop_prob"],
        null_class=c["model"]["num_classes"],
        groups=groups,
    )
    times = v["time_n" if lognormal else "time_u"].T
    draws = Draws(
        time=jnp.asarray(times[:, : groups.times] if groups.times > 1 else times[:, 0]),
        noise=channels_last(v["noise"]),
        drop=jnp.asarray(v["drop_u"]),
        terms={TERM: jnp.asarray(v["teacher_interval_u"].T)},
        groups=(jnp.asarray(v["mask_u"]), jnp.asarray(v["full_u"])) if groups.count > 1 else (),
    )
    return loss, draws


def times_of_tokens(t, ids) -> jax.Array:
    """Of groups, or the one time of all tokens."""
    return of_each_token(t, ids) if t.ndim == 2 else jnp.broadcast_to(t[:, None], ids.shape)


@pytest.fixture(scope="module")
def outcome(golden, case):
    v = golden.vectors
    loss, draws = objective(golden, case)
    x0, labels = channels_last(v["images"]), jnp.asarray(v["labels"])
    tokens = v["mask_u"].shape[1]

    def run(student, teacher):
        net, head = parted(student)
        batch = loss.forward(net, x0, labels, draws, teacher)
        ids = jnp.zeros((len(x0), tokens), jnp.int32) if batch.ids is None else batch.ids
        grads, metrics = gradients(student, Noised(x0, labels, draws), teacher, objective=loss)
        flow = loss.terms["flow"](batch)
        found = {
            "t": times_of_tokens(batch.t, ids),
            "labels_after_drop": batch.y,
            "pred_tokens": embed.patchify(batch.out.pred, golden.patch),
            "target_tokens": embed.patchify(batch.target, golden.patch),
            "denoising_loss": flow if flow.ndim == 1 else flow.mean(axis=1),
            "total": metrics["loss"].value,
        }
        if batch.ids is not None:
            found["group_ids"] = ids
        if TERM in loss.terms:
            term = loss.terms[TERM]
            x, t, seen = term.teacher_inputs(batch, draws.terms[TERM])
            taught = batch.teacher.tokens(x, t, labels, seen, (golden.tap,))[golden.tap]
            features = heads.apply_mlp(head[TERM], batch.out.features[term.depth], jnp.float32)
            found |= {
                "t_teacher": times_of_tokens(t, ids),
                "student_features": features,
                "teacher_features": taught,
                "align_loss_mean": metrics[f"loss/{TERM}"].value,
            }
        return found, grads

    return quick_jit(run)(golden.student, golden.teacher)


def test_losses_and_what_is_compared_are_the_published_ones(golden, case, outcome):
    compared = [name for name in outcome[0] if f"{case}__{name}" in golden.vectors.arrays]
    assert {"t", "total", "pred_tokens"} <= set(compared)
    for name in compared:
        golden.vectors.assert_close(f"{case}__{name}", outcome[0][name])


def test_every_gradient_is_the_published_one(golden, case, outcome):
    assert_gradients_close(golden.vectors, golden.net, case, outcome[1])


# Sampling.


@pytest.fixture(scope="module")
def sampling(golden_dir):
    v = Vectors(golden_dir, "dts_as_sampling")
    net = sit(v.config["model"])
    return SimpleNamespace(vectors=v, net=net, params=from_published(net, v.weights()))


def sampled(sampling, number: int) -> np.ndarray:
    """The final latents of a case, through the functions that the program samples with."""
    v, net = sampling.vectors, sampling.net
    config, method = v.config, str(v["case_method"][number])
    scale = float(v["case_cfg_scale"][number])
    sampler = SAMPLERS[method](config["num_steps"])
    cfg = {"cfg": Guidance(scale, config["guidance_low"], config["guidance_high"])}
    groups = SamplingGroups(
        float(v["case_mask_ratio"][number]),
        each_step=bool(v["case_mask_ratio"][number])
        and str(v["case_mask_type"][number]) == "random",
    )
    ranks = jnp.asarray(v["mask_u"])

    def of_step(i):
        return groups.of_network(ranks[i])

    given = {"groups_of_step": of_step} if groups.each_step else {"groups": of_step(0)}

    def run(params, z, y, noise):
        guided = Guided(
            net,
            params,
            Flow("linear", "uniform"),
            y,
            null_class=config["null_label"],
            scales={"cfg": scale},
            channels={},
            **(given if groups.share else {}),
        )
        cut = guidance.segments(sampler.grid(), cfg)
        return base.sample(sampler, sampler.grid(), guided.fields(cut), z, lambda i: noise[i])

    inputs = (channels_last(v["z"]), jnp.asarray(v["y"]), channels_last(v["sde_noise"]))
    return channels_first(quick_jit(run)(sampling.params, *inputs))


def test_samples_of_separated_tokens_are_the_published_ones(sampling, sampled_case):
    v = sampling.vectors
    expected = v["result"][sampled_case]
    assert_within(
        f"case {sampled_case}", sampled(sampling, sampled_case), expected, v.bound("result")
    )
