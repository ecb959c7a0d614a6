"""DiT, its process, losses, guidance and samplers against the published SRA implementation."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but
from vectors import (
    Vectors,
    assert_trees_within,
    assert_within,
    channels_first,
    channels_last,
    dit,
    from_published,
    quick_jit,
)

from ig_jax import guidance
from ig_jax.diffusion import process
from ig_jax.diffusion.ddpm import BETAS, DDPM, STEPS
from ig_jax.diffusion.ddpm_steps import Steps, kept_steps
from ig_jax.generation import plan
from ig_jax.guidance import Guidance
from ig_jax.models.network import Network
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import Draws, Objective
from ig_jax.samplers import SAMPLERS, base

pytestmark = pytest.mark.golden


def network_of(state):
    """Without SRA's head, which is no part of the network."""
    return {name: array for name, array in state.items() if not name.startswith("ap_head.")}


@pytest.fixture(scope="module")
def golden(golden_dir):
    """The model, the student's and the teacher's weights, and the compiled forward pass."""
    vectors = Vectors(golden_dir, "dit_sra")
    config = vectors.config
    net = dit(config["model"])
    taps = (config["block_out_s"], config["block_out_t"])
    return SimpleNamespace(
        vectors=vectors,
        config=config,
        net=net,
        student=from_published(net, network_of(vectors.weights("_student"))),
        teacher=from_published(net, network_of(vectors.weights("_teacher"))),
        run=quick_jit(lambda *inputs: net(*inputs, taps=taps)),
    )


def times(steps: np.ndarray) -> jax.Array:
    """Steps, from 0, in the time of `DDPM`."""
    return jnp.asarray((steps + 1) / STEPS, jnp.float32)


def with_halves_exchanged(net: Network, params):
    """A head that gives the variance where it gave the noise: the network then predicts it."""

    def exchange(leaf):
        halves = leaf.reshape(-1, net.settings.patch_size**2, 2, net.channels)
        return halves[:, :, ::-1].reshape(leaf.shape)

    head = params["final_layer"]
    return {**params, "final_layer": {**head, "linear": jax.tree.map(exchange, head["linear"])}}


# Forward pass.


def test_the_noise_and_the_variance_beside_it_are_the_published_ones(golden):
    v, net = golden.vectors, golden.net
    inputs = channels_last(v["x"]), DDPM().condition_time(times(v["t_fwd"])), jnp.asarray(v["y"])
    halves = (
        golden.run(params, *inputs).pred
        for params in (golden.student, with_halves_exchanged(net, golden.student))
    )
    v.assert_close("fwd_out", channels_first(jnp.concatenate([*halves], axis=-1)))


def test_the_tokens_after_a_block_are_the_published_ones(golden):
    v = golden.vectors
    t = DDPM().condition_time(times(v["t_fwd"]))
    out = golden.run(golden.student, channels_last(v["x"]), t, jnp.asarray(v["y"]))
    v.assert_close("fwd_features", out.features[golden.config["block_out_t"]])


def test_cfg_guides_the_first_three_channels_of_the_noise_as_published(golden):
    v, config, z = golden.vectors, golden.config, channels_last(golden.vectors["z"])
    guided = guidance.Guided(
        net=golden.run,
        params=golden.student,
        process=DDPM(),
        y=jnp.asarray(v["y_sample"]),
        null_class=golden.net.num_classes,
        scales={"cfg": config["cfg_scale"]},
        channels={"cfg": 3},
    )
    t = times(np.array(config["fwd_cfg_t"]))
    velocity = guided.velocity(frozenset({"cfg"}), z, t)
    noise = process.noise_from_velocity(DDPM().coefficients(t), velocity, z)
    labelled_half = v["fwd_cfg_out"][: len(z), : golden.net.channels]
    assert_within("fwd_cfg_out", channels_first(noise), labelled_half, v.bound("fwd_cfg_out"))


# Schedule and training.


def test_the_schedule_meets_every_published_step(golden):
    v = golden.vectors
    np.testing.assert_allclose(BETAS, v["T1000__betas"], rtol=1e-11)
    with jax.enable_x64(True):
        c = DDPM().coefficients(jnp.asarray(np.arange(1, STEPS + 1) / STEPS))
        alphas, sigmas = np.ravel(c.alpha), np.ravel(c.sigma)
    np.testing.assert_allclose(alphas, v["T1000__sqrt_alphas_cumprod"], rtol=1e-11)
    np.testing.assert_allclose(sigmas, v["T1000__sqrt_one_minus_alphas_cumprod"], rtol=1e-11)


def objective(golden, net) -> Objective:
    return Objective(
        net=net,
        process=DDPM(),
        terms={name: TERMS[name](weight=1.0) for name in ("flow", "variational_bound")},
        label_drop=golden.config["model"]["class_dropout_prob"],
        null_class=golden.net.num_classes,
    )


def training_batch(golden) -> tuple[jax.Array, jax.Array, Draws]:
    v = golden.vectors
    draws = Draws(
        time=jnp.asarray((v["train_t"] + 0.5) / STEPS, jnp.float32),
        noise=channels_last(v["train_noise"]),
        drop=jnp.asarray(v["train_drop_u"]),
    )
    return channels_last(v["train_x0"]), jnp.asarray(v["train_labels"]), draws


@pytest.fixture(scope="module")
def training(golden):
    """The student's pass over the training batch, under the process's and objective's own code."""
    loss = objective(golden, golden.run)
    return loss.forward(golden.student, *training_batch(golden))


def test_a_batch_is_noised_as_published(golden, training):
    v = golden.vectors
    np.testing.assert_array_equal(np.round(DDPM().condition_time(training.t)), v["train_t"])
    v.assert_close("train_labels_after_drop", training.y)
    v.assert_close("q_sample", channels_first(training.x_t))


def test_the_squared_error_of_the_noise_is_the_published_one(golden, training):
    golden.vectors.assert_close("train_mse", TERMS["flow"](weight=1.0)(training))


def test_the_variational_bound_and_the_sum_are_the_published_ones(golden, training):
    v = golden.vectors
    bound = TERMS["variational_bound"](weight=1.0)(training)
    v.assert_close("train_vb", bound)
    v.assert_close("train_loss", TERMS["flow"](weight=1.0)(training) + bound)
    assert 0 in v["train_t"]  # the likelihood is among them


def features_of_the_student(head, tokens):
    """SRA's head, written out."""
    hidden = tokens @ head["ap_head.linear1.weight"].T + head["ap_head.linear1.bias"][None, None]
    features = jax.nn.silu(hidden) @ head["ap_head.linear2.weight"].T
    return features + head["ap_head.linear2.bias"][None, None]


def test_what_sra_compares_is_the_tokens_of_the_student_and_of_the_teacher(golden, training):
    """The student's go through its head; the teacher sees less noise."""
    v, config = golden.vectors, golden.config
    tokens = training.out.features[config["block_out_s"]]
    head = v.weights("_student")
    v.assert_close("train_student_features", features_of_the_student(head, tokens))

    t = times(v["train_t_teacher"])
    x_t = DDPM().perturb(training.x0, training.noise, t)
    out = golden.run(golden.teacher, x_t, DDPM().condition_time(t), training.y)
    v.assert_close("train_teacher_features", out.features[config["block_out_t"]])


def test_every_gradient_of_the_sum_with_sras_term_is_the_published_one(golden):
    """SRA's term is written out, so that the rest is all of the other two."""
    v, net, block = golden.vectors, golden.net, golden.config["block_out_s"]
    loss = objective(golden, lambda *inputs, **_: net(*inputs, taps=(block,)))
    head = {n: a for n, a in v.weights("_student").items() if n.startswith("ap_head.")}
    target = jnp.asarray(v["train_teacher_features"])

    def total(params):
        batch = loss.forward(params, *training_batch(golden))
        sizes = jnp.abs(features_of_the_student(head, batch.out.features[block]) - target)
        align = jnp.mean(jnp.where(sizes < 0.05, sizes**2 / 0.1, sizes - 0.025))
        each = [jnp.mean(term(batch)) for term in loss.terms.values()]
        return sum(each) + 0.04 * align

    value, found = quick_jit(jax.value_and_grad(total))(golden.student)
    v.assert_close("train_total_epoch0_res256", value)
    table = np.zeros(golden.student["pos_embed"].shape, np.float32)  # fixed: has no gradient
    published = network_of(v.weights("_grads")) | {"pos_embed": table}
    reference = from_published(net, published)
    ours = {**found, "pos_embed": reference["pos_embed"]}
    assert_trees_within("gradient of", ours, reference, v.bound("grads"))


# Steps and samplers.


def tables(kept) -> dict[str, np.ndarray]:
    """The published arrays, as far as `Steps` has them in some form."""
    c = Steps(kept).tables
    noise = 1 - 1 / c.x0_of_x**2
    return {
        "betas": np.exp(c.log_beta),
        "alphas_cumprod": 1 / c.x0_of_x**2,
        "alphas_cumprod_prev": c.alpha_prev**2,
        "sqrt_alphas_cumprod": 1 / c.x0_of_x,
        "sqrt_one_minus_alphas_cumprod": np.sqrt(noise),
        "log_one_minus_alphas_cumprod": np.log(noise),
        "sqrt_recip_alphas_cumprod": c.x0_of_x,
        "sqrt_recipm1_alphas_cumprod": c.x0_of_noise,
        "posterior_variance": c.deviation**2,
        "posterior_log_variance_clipped": c.log_posterior,
        "posterior_mean_coef1": c.m_0,
        "posterior_mean_coef2": c.m_x,
    }


@pytest.mark.parametrize(("name", "num_steps"), [("T1000", STEPS), ("spaced10", 10)])
def test_every_constant_of_the_steps_is_the_published_one(golden, name, num_steps):
    found = tables(kept_steps(num_steps, "even"))
    for array, values in found.items():
        published = golden.vectors[f"{name}__{array}"]
        np.testing.assert_allclose(values, published, rtol=1e-9, atol=1e-14, err_msg=array)


@pytest.mark.parametrize("name", ["spaced10", "spaced_a", "spaced_b"])
def test_evenly_kept_steps_are_the_published_ones_with_their_betas(golden, name):
    v = golden.vectors
    kept = kept_steps(len(v[f"{name}__timestep_map"]), "even")
    np.testing.assert_array_equal(kept, v[f"{name}__timestep_map"])
    np.testing.assert_allclose(tables(kept)["betas"], v[f"{name}__betas"], rtol=1e-9)


@pytest.mark.parametrize(
    ("published", "num_steps", "spacing"),
    [("ddim25", 25, "stride"), ("sections_10_15_20", 45, "10,15,20")],
)
def test_steps_by_stride_and_by_section_are_the_published_ones(
    golden, published, num_steps, spacing
):
    kept = kept_steps(num_steps, spacing)
    np.testing.assert_array_equal(kept, golden.vectors[f"spaced_{published}__timestep_map"])


def sampled(golden, sampler, noise, **cfg) -> np.ndarray:
    """Samples of the published start and labels, by the plan of a run."""
    v = golden.vectors
    given = {kind: Guidance(s, 0.0, 1.0, channels=3) for kind, s in cfg.items()}
    chosen = plan.plan(DDPM(), sampler, given)
    guided = guidance.Guided(
        net=golden.net,
        params=golden.student,
        process=DDPM(),
        y=jnp.asarray(v["y_sample"]),
        null_class=golden.net.num_classes,
        scales=cfg,
        channels=dict(chosen.channels),
    )
    draws, grid = channels_last(noise), np.array(chosen.grid)
    fields = guided.fields(chosen.segments)
    run = quick_jit(lambda x: base.sample(sampler, grid, fields, x, lambda i: draws[i]))
    return channels_first(run(channels_last(v["z"])))


@pytest.mark.parametrize("clip", slow_but([True], [False, True]))
def test_ancestral_samples_are_the_published_ones(golden, clip):
    v, name = golden.vectors, "sample_nocfg_clip" if clip else "sample_nocfg"
    sampler = SAMPLERS["ancestral"](golden.config["sample_steps"], clip_denoised=clip)
    v.assert_close(name, sampled(golden, sampler, v["sample_noise_nocfg"]))


@pytest.mark.parametrize("clip", slow_but([False], [False, True]))
def test_ancestral_samples_with_cfg_are_the_published_ones(golden, clip):
    """The published batch holds both branches; its first half is the sample, as is its noise."""
    v, n = golden.vectors, len(golden.vectors["z"])
    name = "sample_cfg_full_batch_clip" if clip else "sample_cfg_full_batch"
    sampler = SAMPLERS["ancestral"](golden.config["sample_steps"], clip_denoised=clip)
    noise, scale = v["sample_noise_cfg"][:, :n], golden.config["cfg_scale"]
    assert_within(name, sampled(golden, sampler, noise, cfg=scale), v[name][:n], v.bound(name))


def test_samples_of_ddim_without_noise_are_the_published_ones(golden):
    v = golden.vectors
    sampler = SAMPLERS["ddim"](golden.config["sample_steps"])
    nothing = np.full_like(v["sample_noise_nocfg"], 1e6)  # would show
    v.assert_close("sample_ddim_eta0", sampled(golden, sampler, nothing))
