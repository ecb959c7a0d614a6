"""Draws that must have nothing to do with each other, taken from the very functions that train and
sample, and compared pairwise: what is drawn, step, seed, and place in the batch.

Every draw is a column of thousands of numbers from fixed keys, so nothing here changes from run to
run. Two draws from one key are monotone functions of each other, whatever their distributions and
shapes, as long as the n-th number of one is compared with the n-th of the other.
"""

import itertools
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from vectors import quick_jit

from ig_jax import prng
from ig_jax.codecs import va_vae
from ig_jax.codecs.autoencoders import SdVae, VaVae
from ig_jax.io.torch import writer as torch_writer
from ig_jax.objectives import metrics
from ig_jax.optim.train_state import TrainState
from ig_jax.training import step as training_step
from ig_jax.training.step import train_step

N = 4096
SPACING = 6 / np.sqrt(N)  # six standard deviations of the correlation of independent columns
STEPS, SEEDS = (0, 1), (0, 1)
LEFT = 1000.0  # what the made-up encoder shows of an image's left side


def ranks(column: np.ndarray) -> np.ndarray:
    """0, 1, ... in the order of the values, equal ones alike; then centred, and of length 1."""
    order = np.unique(column, return_inverse=True)[1].astype(np.float64)
    order -= order.mean()
    return order / np.linalg.norm(order)


def assert_independent(columns: dict[str, np.ndarray]) -> None:
    """Each against each other, and against every other shifted by a row."""
    names = list(columns)
    table = np.stack([ranks(columns[name]) for name in names])
    same_row, next_row = table @ table.T, table @ np.roll(table, 1, axis=1).T
    for (i, one), (j, other) in itertools.product(enumerate(names), repeat=2):
        if i < j:
            assert abs(same_row[i, j]) < SPACING, f"{one} depends on {other}"
        assert abs(next_row[i, j]) < SPACING, f"{one} depends on the row before of {other}"


def assert_all_different(column: np.ndarray) -> None:
    assert len(np.unique(column)) > 0.99 * N  # some draws in float32 coincide


@pytest.fixture(scope="module")
def va_vae_codec(tmp_path_factory):
    """Statistics that leave latents as they are."""
    file = tmp_path_factory.mktemp("statistics") / "latents_stats.pt"
    shape = (1, 32, 1, 1)
    torch_writer.save(file, {"mean": np.zeros(shape), "std": np.ones(shape)})
    return VaVae("", statistics=str(file))


def moments() -> np.ndarray:
    """Posteriors with mean 0 and standard deviation 1."""
    return np.broadcast_to(np.repeat(np.float32([0, 1]), 4), (N, 1, 1, 8))


def twins() -> np.ndarray:
    """A latent of 1 whose flipped copy is -1."""
    return np.broadcast_to(np.repeat(np.float32([1, -1]), 32), (N, 1, 1, 64))


def pictures() -> np.ndarray:
    """White on the left, black on the right."""
    both = np.repeat(np.uint8([255, 0]), 8)[None, None, :, None]
    return np.broadcast_to(both, (N, 16, 16, 3))


def encode(weights, x, dtype):
    """A posterior around +-LEFT, by what is on the left, with standard deviation 1."""
    mean = LEFT * jnp.broadcast_to(x[:, :1, :1, :1], (len(x), 1, 1, 32))
    return mean, jnp.ones_like(mean)


Drawn = dict[tuple[int, int], dict[str, np.ndarray]]  # (seed, step) -> what -> its values


def drawn(codec, stored: np.ndarray, monkeypatch) -> Drawn:
    """Latents and draws of the batches of a few steps, as a training step makes them."""

    def update(state, batch, **_):
        draws = batch.draws
        found = {"time": draws.time, "noise": draws.noise, "label drop": draws.drop}
        found["latents"] = batch.x0
        return state, {name: metrics.once(value) for name, value in found.items()}

    monkeypatch.setattr(training_step, "update_state", update)
    monkeypatch.setattr(training_step.collectives, "over_devices", lambda *_, **__: None)
    found = {}
    for seed in SEEDS:
        exp = tiny.experiment({"seed": seed})
        own = type(exp.config.data.codec)
        monkeypatch.setattr(own, "latent", lambda _, *given: codec.latent(*given))
        step = quick_jit(partial(train_step, exp=exp))
        batch = {"stored": jnp.asarray(stored), "label": jnp.zeros(N, jnp.int32)}
        for number in STEPS:
            _, values = step(TrainState(jnp.int32(number), {}, {}, {}), batch)
            found[seed, number] = {name: np.asarray(once.total) for name, once in values.items()}
    return found


def columns(found: Drawn, **of_latents) -> dict[str, np.ndarray]:
    """Every draw of every seed and step: its first N numbers, and the last number of each row."""
    named = {}
    for (seed, step), batch in found.items():
        latents, draws = batch["latents"], {n: x for n, x in batch.items() if n != "latents"}
        draws |= {name: take(np.asarray(latents)) for name, take in of_latents.items()}
        for name, values in draws.items():
            rows = np.asarray(values).reshape(N, -1)
            where = f"{name} of seed {seed}, step {step}"
            named[where] = rows.ravel()[:N]
            if rows.shape[1] > 1:
                named[f"{where}, by row"] = rows[:, -1]
    return named


def test_time_noise_label_drop_and_the_posterior_of_moments_are_drawn_apart(monkeypatch):
    posterior = {"posterior": lambda x: x}
    found = columns(drawn(SdVae(""), moments(), monkeypatch), **posterior)
    for column in found.values():
        assert_all_different(column)
    assert_independent(found)


@pytest.mark.slow
def test_the_choice_between_twins_is_drawn_apart_and_takes_either_as_often(
    va_vae_codec, monkeypatch
):
    found = columns(drawn(va_vae_codec, twins(), monkeypatch), flip=lambda x: x[..., 0])
    assert_independent(found)
    flips = np.concatenate([column < 0 for name, column in found.items() if "flip" in name])
    # Five standard deviations: a share of 0.45 would be sixteen of them away.
    assert len(flips) == 4 * N and abs(flips.mean() - 0.5) < 2.5 / np.sqrt(len(flips))


@pytest.mark.slow
def test_flip_and_posterior_of_pictures_are_drawn_apart(va_vae_codec, monkeypatch):
    monkeypatch.setattr(va_vae, "encode", encode)
    both = {"flip": lambda x: np.sign(x[..., 0]), "posterior": lambda x: x - LEFT * np.sign(x)}
    found = columns(drawn(va_vae_codec, pictures(), monkeypatch), **both)
    assert_independent(found)
    flips = np.concatenate([column < 0 for name, column in found.items() if "flip" in name])
    assert abs(flips.mean() - 0.5) < 2.5 / np.sqrt(len(flips))


def test_latents_labels_and_every_step_of_samples_are_drawn_apart():
    """Of one seed and the next; sample i and i + 1 lie in rows next to each other."""

    @quick_jit
    def draws(seed):
        keys = prng.sample_keys(seed, jnp.arange(N))
        addresses = (prng.LATENTS, *(prng.FIRST_STEP + i for i in range(3)))
        normal = [prng.sample_normal(keys, (2,), address) for address in addresses]
        return jnp.concatenate(normal, axis=1), prng.sample_labels(keys, 1000)

    found = {}
    for seed in SEEDS:
        normal, labels = (np.asarray(x) for x in draws(seed))
        found |= {f"normal {i} of seed {seed}": column for i, column in enumerate(normal.T)}
        found[f"label of seed {seed}"] = labels
        for column in normal.T:
            assert_all_different(column)
    assert_independent(found)
