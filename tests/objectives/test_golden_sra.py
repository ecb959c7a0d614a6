"""SRA's loss and training steps against the published implementation, from the same randomness."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import slow_but
from vectors import (
    DISTANCE_OF,
    Vectors,
    adamw_settings,
    assert_gradients_close,
    assert_trees_within,
    assert_within,
    channels_last,
    dit,
    from_published,
    parameters_of,
    quick_jit,
    sit,
)

from ig_jax import optim, pytree
from ig_jax.codecs.sd_vae import SCALE
from ig_jax.diffusion.ddpm import DDPM, STEPS
from ig_jax.diffusion.flow import Flow
from ig_jax.objectives import TERMS, heads
from ig_jax.objectives.base import Draws, Objective
from ig_jax.objectives.self_alignment import DISTANCES, SelfAlignment
from ig_jax.optim import ema
from ig_jax.optim.train_state import TrainState, parted, trained
from ig_jax.training.step import Noised, gradients, update_state

pytestmark = pytest.mark.golden

TERM = "self_alignment"
QUICK = ("sml1_linear_uniform",)  # cases that are not slow
WEIGHTS = {"cos": 0.5}  # at epoch 0 and 256 pixels; of the others 0.2


def all_cases(v: Vectors) -> list[str]:
    return v.config["cases"]


def with_gradients(v: Vectors) -> list[str]:
    return [c for c in all_cases(v) if (v.folder / f"{v.name}_grads_{c}.safetensors").is_file()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        listed = with_gradients if "gradient" in metafunc.function.__name__ else all_cases
        cases = parameters_of(metafunc, "sra_sit_loss", listed, QUICK)
        metafunc.parametrize("case", cases, scope="module")


def alignment(config, kind: str) -> SelfAlignment:
    return SelfAlignment(
        WEIGHTS.get(kind, 0.2),
        config["block_out_s"],
        config["block_out_t"],
        max_interval=config["t_max"],
        distance=DISTANCE_OF[kind],
    )


def objective(net, process, config, kind: str) -> Objective:
    return Objective(
        net=net,
        process=process,
        terms={"flow": TERMS["flow"](1.0), TERM: alignment(config, kind)},
        label_drop=config["model"]["class_dropout_prob"],
        null_class=config["model"]["num_classes"],
    )


# Loss.


@pytest.fixture(scope="module")
def golden(golden_dir):
    vectors = Vectors(golden_dir, "sra_sit_loss")
    net = sit(vectors.config["model"])
    teacher, _ = parted(from_published(net, vectors.weights("_teacher")))
    return SimpleNamespace(
        vectors=vectors,
        net=net,
        student=from_published(net, vectors.weights("_student")),
        teacher=teacher,
        x0=channels_last(vectors["images"]),
        labels=jnp.asarray(vectors["labels"]),
    )


@pytest.fixture(scope="module")
def outcome(golden, case):
    """The batch of a case under the objective: what terms see, their losses, all gradients."""
    v, (kind, path, times) = golden.vectors, case.split("_")
    loss = objective(golden.net, Flow(path, times), v.config, kind)
    draws = Draws(
        time=jnp.asarray(v["t_draw" if times == "uniform" else "lognormal_draw"]),
        noise=channels_last(v["noise"]),
        drop=jnp.asarray(v["drop_u"]),
        terms={TERM: jnp.asarray(v["teacher_interval_u"])[:, None]},
    )

    def run(student, teacher):
        net, head = parted(student)
        batch = loss.forward(net, golden.x0, golden.labels, draws, teacher)
        features = heads.apply_mlp(
            head[TERM], batch.out.features[v.config["block_out_s"]], jnp.float32
        )
        t = loss.process.less_noisy(batch.t, draws.terms[TERM][:, 0], v.config["t_max"])
        block = v.config["block_out_t"]
        x_t = loss.process.perturb(golden.x0, draws.noise, t)
        grads, metrics = gradients(
            student, Noised(golden.x0, golden.labels, draws), teacher, objective=loss
        )
        return {
            "t": batch.t,
            "t_teacher": t,
            "labels_after_drop": batch.y,
            "denoising_loss": loss.terms["flow"](batch),
            "align_loss_mean": metrics[f"loss/{TERM}"].value,
            "total_epoch0_res256": metrics["loss"].value,
            "student_features": features,
            "teacher_features": batch.teacher.tokens(x_t, t, batch.y, None, (block,))[block],
        }, grads

    return quick_jit(run)(golden.student, golden.teacher)


def test_losses_and_what_is_compared_are_the_published_ones(golden, case, outcome):
    for name, ours in outcome[0].items():
        if f"{case}__{name}" in golden.vectors.arrays:
            golden.vectors.assert_close(f"{case}__{name}", ours)


def test_every_gradient_is_the_published_one(golden, case, outcome):
    """The student's; with the projected tokens it reaches the head and the blocks before it."""
    assert_gradients_close(golden.vectors, golden.net, case, outcome[1])


def test_the_cosine_over_channels_is_another_loss(golden):
    """The published one runs over tokens: the two must not be exchanged."""
    key = jax.random.key(3)
    a, b = jax.random.normal(key, (2, 5, 7, 3))
    over_tokens, over_channels = (DISTANCES[n](a, b, 0.05) for n in ("cosine_tokens", "cosine"))
    assert over_tokens.shape == (5, 3) and over_channels.shape == (5, 7)
    by_hand = 1 - np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(over_tokens, by_hand, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["sit_256_noncos", "dit_256", "sit_512_noncos", "dit_512"])
def test_weights_fall_as_published(golden, schedule):
    model, size, *_ = schedule.split("_")
    v = golden.vectors
    start, epochs, constant = (
        0.2 if model == "sit" else 0.04,
        1000 if size == "256" else 800,
        149 if size == "256" else 99,
    )
    term = SelfAlignment(start, 1, 2, weight_factor=0.1 ** (1 / epochs), constant_epochs=constant)
    ours = [float(term.weight_at(jnp.int32(epoch))) for epoch in v["schedule_epoch"]]
    np.testing.assert_allclose(ours, v[f"schedule_{schedule}"], rtol=1e-5)
    assert np.all(v[f"schedule_sit_{size}_cos"] == 0.5)


# Training steps.

RUNS = ("sra_sit_train", "dit_sra_train")


def objective_of_run(name: str, config) -> Objective:
    """That of the published trainer; an epoch of its DiT's schedule is a step here."""
    model = config["model"]
    if name == "sra_sit_train":
        return objective(sit(model), Flow(config["path_type"], "uniform"), config, "cos")
    alignment = SelfAlignment(
        0.04,
        config["block_out_s"],
        config["block_out_t"],
        max_interval=config["t_max"],
        distance="smooth_l1",
        beta=config["beta"],
        weight_factor=0.1 ** (1 / 1000),
        constant_epochs=149,
    )
    terms = {"flow": TERMS["flow"](1.0), "variational_bound": TERMS["variational_bound"](1.0)}
    return Objective(
        net=dit(model),
        process=DDPM(),
        terms={**terms, TERM: alignment},
        label_drop=model["class_dropout_prob"],
        null_class=model["num_classes"],
    )


def draws_of_step(name: str, v: Vectors, i: int) -> Draws:
    if name == "sra_sit_train":
        time, interval = v["time_u"][i], v["teacher_interval_u"][i]
    else:  # in the middle of what floor() makes the step, and the interval
        time = (v["t"][i] + 0.5) / STEPS
        interval = (v["teacher_interval"][i] + 0.5) / v.config["t_max_int"]
    return Draws(
        time=jnp.asarray(time, jnp.float32),
        noise=channels_last(v["noise"][i]),
        drop=jnp.asarray(v["drop_u"][i]),
        terms={TERM: jnp.asarray(interval, jnp.float32)[:, None]},
    )


PUBLISHED_RUNS = [(name, kind) for name in RUNS for kind in ("", "fast")]


@pytest.fixture(scope="module", params=slow_but(["('sra_sit_train', 'fast')"], PUBLISHED_RUNS, str))
def training(golden_dir, request):
    """All steps of a published run, as shipped and fast: metrics, and the last state."""
    name, fast = request.param
    v = Vectors(golden_dir, name)
    config = v.config
    lr = config["fast"]["lr"] if fast else config["optimizer"]["lr"]
    decay = config["fast"]["ema_decay"] if fast else config["ema_decay"]
    settings = replace(adamw_settings(config), learning_rate=lr)
    optimizer, loss = optim.adamw(settings, config["steps"]), objective_of_run(name, config)
    epochs = v.arrays.get("epoch", np.zeros(config["steps"], int))

    @quick_jit
    def step(state, batch, epoch):
        # The weight of the term is that of an epoch; Adam counts its updates by itself.
        state, logged = update_state(
            state.replace(step=epoch),
            batch,
            gradients=partial(gradients, objective=loss),
            optimizer=optimizer,
            teacher_decay=decay,
        )
        return state, logged

    params, terms = parted(from_published(loss.net, v.weights("_init")))
    state = TrainState(
        jnp.int32(0),
        params,
        optimizer.init(trained(params, terms)),
        ema.init(params, (decay,)),
        terms,
    )
    mean, std = np.split(v["moments"], 2, axis=-3)
    latents = (mean + std * v["posterior_eps"]) * SCALE
    metrics = []
    for i in range(config["steps"]):
        labels = jnp.asarray(v["labels"][i])
        batch = Noised(channels_last(latents[i]), labels, draws_of_step(name, v, i))
        state, logged = step(state, batch, jnp.int32(epochs[i]))
        metrics.append(logged)
    return SimpleNamespace(
        vectors=v,
        net=loss.net,
        prefix="fast__" if fast else "",
        suffix="_fast" if fast else "",
        lr=lr,
        robust_below=config["robust_below"]["fast" if fast else "reference"],
        state=state,
        average=state.ema[ema.name(decay)],
        latents=latents,
        weights=[float(loss.terms[TERM].weight_at(jnp.int32(e))) for e in epochs],
        metrics={name: np.array([m[name].value for m in metrics]) for name in metrics[0]},
    )


def test_every_step_has_the_published_losses_and_gradient_norm(training):
    v, prefix, found = training.vectors, training.prefix, training.metrics
    v.assert_close("x", training.latents)
    ours = {
        "gen_loss": found["loss/flow"] + found.get("loss/variational_bound", 0.0),
        "weighted_align_loss": training.weights * found[f"loss/{TERM}"],
        "total_loss": found["loss"],
        "grad_norm_before_clip": found["grad_norm"],
    }
    for name, values in ours.items():
        # They see weights that differ by what Adam makes of rounding, in the fast run most: as far
        # as the weights themselves may.
        bound = max(v.bound(prefix + name), 10 * training.robust_below)
        assert_within(prefix + name, values, v[prefix + name], bound)


@pytest.mark.parametrize("what", ["final", "ema"])
def test_trained_weights_and_their_average_are_the_published_ones(training, what):
    """The head is not averaged here: nothing reads its average."""
    v, net = training.vectors, training.net
    mask = pytree.flatten(from_published(net, v.weights(f"_robust{training.suffix}")))
    mask["blocks.attn.qkv.bias"] = mask["blocks.attn.qkv.bias"].at[:, 1].set(0)
    reference = from_published(net, v.weights(f"_{what}{training.suffix}"))
    ours = training.state.trained if what == "final" else training.average
    reference = reference if what == "final" else parted(reference)[0]
    kept = {name: leaf == 1 for name, leaf in mask.items() if name in pytree.flatten(ours)}
    masked = jax.tree.map(np.where, pytree.unflatten(kept), ours, reference)
    bound = 10 * training.robust_below
    assert_trees_within(f"{what}, robust entries:", masked, reference, bound)
    furthest = v.config["steps"] * training.lr
    assert_trees_within(f"{what}, all entries:", ours, reference, furthest)


def test_teacher_moves_between_the_steps_of_the_fast_run(training):
    """Otherwise the order of update and teacher would not show in the losses."""
    initial, _ = parted(from_published(training.net, training.vectors.weights("_init")))
    moved = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(training.average), jax.tree.leaves(initial), strict=True)
    )
    assert moved > (1e-3 if training.suffix else 0)
