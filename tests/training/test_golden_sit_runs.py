"""Training steps and samplers of SiT + IG against the published implementation."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vectors import (
    EPSILON,
    Vectors,
    adamw_settings,
    assert_trees_within,
    assert_within,
    channels_first,
    channels_last,
    from_published,
    objective,
    parameters_of,
    quick_jit,
    sit,
)

from ig_jax import guidance, optim, pytree
from ig_jax.diffusion.flow import Flow
from ig_jax.guidance import Guidance, Guided
from ig_jax.objectives.base import Draws
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState
from ig_jax.samplers import SAMPLERS, base
from ig_jax.training.step import Noised, gradients, update_state
from ig_jax.types import Params

pytestmark = pytest.mark.golden

# Cases of the samplers that are not slow: Heun with CFG on an interval, Euler-Maruyama with IG too.
QUICK = (7, 20)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The sampler cases that this directory holds."""
    if "case" in metafunc.fixturenames:
        cases = parameters_of(
            metafunc, "sit_samplers", lambda v: range(len(v["case_method"])), QUICK
        )
        metafunc.parametrize("case", cases)


# Training.

# Where the mask is 1, the reference's float32 and float64 weights agree to 1e-7 after all steps.
# Adam enlarges rounding where gradients are small: ten times that is still hundreds of times less
# than the weights move, which is about steps x learning rate.
ROBUST = 1e-6


@pytest.fixture(scope="module")
def training(golden_dir):
    """All steps of sit_train: vectors, initial parameters, last state, metrics of every step."""
    vectors = Vectors(golden_dir, "sit_train")
    config, model = vectors.config, vectors.config["model"]
    net = sit(model)
    # However the times were weighted: they are given, and a uniform draw is the time itself.
    process = Flow(config["path_type"], "uniform")
    loss = objective(net, process, model, aux_weight=0.5)
    optimizer = optim.adamw(adamw_settings(config), config["steps"])
    decays = (config["ema_decay"], config["ema_fast_decay"])
    step = quick_jit(
        partial(
            update_state,
            gradients=partial(gradients, objective=loss),
            optimizer=optimizer,
            teacher_decay=decays[0],
        )
    )
    params = from_published(net, vectors.weights("_init"))
    averages = ema.init(params, decays)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), averages)
    metrics = []
    for i in range(config["steps"]):
        draws = Draws(
            time=jnp.asarray(vectors["t"][i]),
            noise=channels_last(vectors["noise"][i]),
            drop=jnp.asarray(vectors["drop_u"][i]),
        )
        x0, labels = channels_last(vectors["latents"][i]), jnp.asarray(vectors["labels"][i])
        state, logged = step(state, Noised(x0, labels, draws))
        metrics.append(logged)
    return SimpleNamespace(
        vectors=vectors,
        net=net,
        initial=params,
        state=state,
        metrics={name: np.array([m[name].value for m in metrics]) for name in metrics[0]},
    )


def test_every_step_has_the_published_losses_and_gradient_norm(training):
    assert int(training.state.step) == training.vectors.config["steps"]
    training.vectors.assert_close("gen_loss", training.metrics["loss/flow"])
    half = 0.5 * training.metrics["loss/internal_guidance"]
    training.vectors.assert_close("aux_loss_times_half", half)
    training.vectors.assert_close("total_loss", training.metrics["loss"])
    training.vectors.assert_close("grad_norm_before_clip", training.metrics["grad_norm"])


def robust(training) -> Params:
    """True for entries that do not depend on how float32 rounds."""
    mask = pytree.flatten(from_published(training.net, training.vectors.weights("_robust")))
    # The softmax does not see the keys' bias: its gradient is rounding noise, different in every
    # port, that Adam turns into steps. Entries which are 1 there are so by luck.
    mask["blocks.attn.qkv.bias"] = mask["blocks.attn.qkv.bias"].at[:, 1].set(0)
    return pytree.unflatten({name: leaf == 1 for name, leaf in mask.items()})


def assert_weights_within(training, what: str, ours: Params, suffix: str, bound: float) -> None:
    """`bound` holds where weights are robust; elsewhere, the most that Adam can move a weight."""
    config, mask = training.vectors.config, robust(training)
    reference = from_published(training.net, training.vectors.weights(suffix))
    masked = jax.tree.map(np.where, mask, ours, reference)
    assert_trees_within(f"{what}, robust entries:", masked, reference, bound)
    furthest = config["steps"] * config["optimizer"]["lr"]
    assert_trees_within(f"{what}, all entries:", ours, reference, furthest)


def test_trained_weights_are_the_published_ones(training):
    assert_weights_within(training, "weights", training.state.params, "_final", ROBUST)


def test_optimizer_leaves_the_position_table_alone(training):
    before, after = training.initial["pos_embed"], training.state.params["pos_embed"]
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(after, training.vectors.weights("_final")["pos_embed"])


def test_fast_average_is_the_published_one(training):
    average = training.state.ema[str(training.vectors.config["ema_fast_decay"])]
    assert_weights_within(training, "fast average", average, "_ema_fast", ROBUST)


def test_slow_average_is_the_published_one(training):
    config = training.vectors.config
    # It moves by few last places itself: product and sum round in every step, here and there.
    last_place = EPSILON * training.vectors.tolerances["ema"]["max_abs"]
    average = training.state.ema[str(config["ema_decay"])]
    bound = 2 * config["steps"] * last_place
    assert_weights_within(training, "slow average", average, "_ema", bound)


# Sampling.


@pytest.fixture(scope="module")
def sampling(golden_dir):
    """The model of sit_samplers, its weights and everything its cases start from."""
    vectors = Vectors(golden_dir, "sit_samplers")
    net = sit(vectors.config["model"])
    return SimpleNamespace(
        vectors=vectors,
        net=net,
        compiled=jax.jit(net),  # traced once for all cases
        params=from_published(net, vectors.weights()),
        y=jnp.asarray(vectors["y"]),
        z=channels_last(vectors["z"]),
        noise=channels_last(vectors["sde_noise"]),
    )


def guidance_of(vectors: Vectors, case: int, kind: str) -> Guidance:
    """'ig' or 'cfg' of a case. The reference takes scales below 1 for off, too."""
    scale, low, high = (float(vectors[f"case_{kind}_{n}"][case]) for n in ("scale", "low", "high"))
    return Guidance(max(scale, 1.0), low, high)


def sampler_of(vectors: Vectors, case: int):
    method = str(vectors["case_method"][case])
    return SAMPLERS[method.removesuffix("_ig")](vectors.config["num_steps"])


def result_of(sampling, case: int, net) -> np.ndarray:
    """The final latents of a case, through the functions that the program samples with."""
    vectors, sampler = sampling.vectors, sampler_of(sampling.vectors, case)
    # Of the published samplers only the one with this suffix knows Internal Guidance.
    with_ig = str(vectors["case_method"][case]).endswith("_ig")
    ig = guidance_of(vectors, case, "ig") if with_ig else Guidance(1.0, 0.0, 1.0)
    cfg = guidance_of(vectors, case, "cfg")

    def run(params, z, y, noise):
        guided = Guided(
            net,
            params,
            Flow(str(vectors["case_path"][case]), "uniform"),
            y,
            null_class=sampling.net.num_classes,
            scales={"ig": ig.scale, "cfg": cfg.scale},
            channels={},
            readout=sampling.net.settings.readouts[0],
        )
        cut = guidance.segments(sampler.grid(), {"ig": ig, "cfg": cfg})
        return base.sample(sampler, sampler.grid(), guided.fields(cut), z, lambda i: noise[i])

    inputs = (sampling.params, sampling.z, sampling.y, sampling.noise)
    return channels_first(quick_jit(run)(*inputs))


def test_sampler_arrives_where_the_published_one_does(sampling, case):
    # The reference steps in float64; its float32 network is what sets the tolerance, and hides it.
    result = result_of(sampling, case, sampling.compiled)
    bound = sampling.vectors.bound("result")
    assert_within(f"case {case}", result, sampling.vectors["result"][case], bound)


@pytest.mark.parametrize(("kind", "array"), [("ode", "t_ode"), ("sde", "t_sde")])
def test_time_grids_are_the_published_ones(sampling, kind, array):
    vectors = sampling.vectors
    names = {"ode": ("euler", "heun"), "sde": ("euler_maruyama",)}[kind]
    for name in names:
        grid = SAMPLERS[name](vectors.config["num_steps"]).grid()
        assert_within(f"grid of {name}", grid, vectors[array], np.finfo(np.float64).eps)


@pytest.mark.slow
def test_network_is_called_as_published(sampling):
    vectors, calls = sampling.vectors, []

    def net(params, x, t, y, *, taps=()):
        jax.debug.callback(lambda *inputs: calls.append(inputs), x, t, y, ordered=True)
        return sampling.compiled(params, x, t, y)

    result_of(sampling, vectors.config["trace_case"], net)
    jax.effects_barrier()
    first_half = len(vectors["y"])
    vectors.assert_close("trace_model_batch", [len(x) for x, _, _ in calls])
    vectors.assert_close("trace_model_y_last", [y[-1] for _, _, y in calls])
    vectors.assert_close("trace_model_t", [t[-1] for _, t, _ in calls])
    inputs = np.stack([channels_first(x[:first_half]) for x, _, _ in calls])
    vectors.assert_close("trace_model_x_first_half", inputs)
