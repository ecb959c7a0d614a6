"""What is fed to training and sampling: every example once an epoch, every random draw once.

The loader is tested on a source whose examples are their own numbers.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

from ig_jax import prng
from ig_jax.codecs import Identity
from ig_jax.data import Digits, loader
from ig_jax.errors import UserError


@dataclass(frozen=True)
class Numbers:
    """Example i is the number i."""

    size: int

    stored_shape = (1, 1, 1)
    stored_dtype = np.uint8
    num_classes = 1

    def __len__(self) -> int:
        return self.size

    def batch(self, indices):
        stored = np.asarray(indices, np.uint8).reshape(-1, 1, 1, 1)
        return {"stored": stored, "label": np.asarray(indices, np.int32)}

    def held_out(self):
        return None


def labels(count: int, batch_size: int, seed: int = 0, size: int = 10, **chosen):
    """Labels [count, rows] of batches; `chosen`: which, as for the loader."""
    iterator = loader.batches(Numbers(size), batch_size, seed, **chosen)
    return np.stack([next(iterator)["label"] for _ in range(count)])


def test_every_epoch_holds_each_example_once_though_batches_straddle_epochs():
    stream = labels(count=10, batch_size=4).ravel()  # four epochs of ten
    for epoch in stream.reshape(4, 10):
        assert sorted(epoch) == list(range(10))


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = [*labels(3, 20, seed=0, size=20), *labels(3, 20, seed=1, size=20)]
    assert len({tuple(order) for order in orders}) == 6
    assert tuple(range(20)) not in {tuple(order) for order in orders}
    np.testing.assert_array_equal(labels(3, 20, seed=0, size=20), orders[:3])


def test_images_and_labels_stay_together():
    batch = next(loader.batches(Numbers(10), 4, seed=0))
    np.testing.assert_array_equal(batch["stored"].ravel(), batch["label"])


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_a_resumed_stream_is_the_unbroken_one_from_that_batch_on(start):
    np.testing.assert_array_equal(labels(10 - start, 4, start=4 * start), labels(10, 4)[start:])


@pytest.mark.parametrize("size", [3, 5, 8])
@pytest.mark.parametrize("batches", [1, 5])
def test_batches_of_another_size_go_on_from_the_next_example(size, batches):
    unbroken = labels(20, 4).ravel()
    after = labels(4, size, start=4 * batches)
    np.testing.assert_array_equal(after.ravel(), unbroken[4 * batches :][: after.size])
    examples = loader.indices(Numbers(10), size, 0, 4 * batches + 2 * size)
    np.testing.assert_array_equal(examples, after[2])


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5, 6, 7], [1, 6]])
def test_some_rows_of_a_batch_are_those_of_the_whole_one(rows):
    np.testing.assert_array_equal(labels(5, 8, rows=np.array(rows)), labels(5, 8)[:, rows])


def test_the_examples_of_a_batch_are_known_without_reading_it():
    for number, batch in enumerate(labels(5, 8)):
        np.testing.assert_array_equal(loader.indices(Numbers(10), 8, 0, 8 * number), batch)


def test_a_batch_larger_than_the_source_holds_each_example_about_as_often():
    stream = labels(4, 25).ravel()
    for epoch in stream.reshape(10, 10):
        assert sorted(epoch) == list(range(10))
    with pytest.raises(UserError, match="data.source: holds no examples"):
        labels(1, 4, size=0)


def as_rows(images, classes) -> np.ndarray:
    """An image and its class in one row, rows sorted: a set that counts repeats."""
    rows = np.concatenate([np.reshape(images, (len(classes), -1)), classes[:, None]], axis=1)
    return rows[np.lexsort(rows.T)].astype(int)


def everything(split: str) -> dict[str, np.ndarray]:
    source = Digits(split)
    return source.batch(np.arange(len(source)))


def test_the_two_splits_of_the_digits_are_all_of_them_and_share_none():
    images, classes = load_digits(return_X_y=True)
    train, held_out = everything("train"), everything("held_out")
    assert (len(train["label"]), len(held_out["label"])) == (1442, 355)
    both = [np.concatenate([train[name], held_out[name]]) for name in ("stored", "label")]
    # 16 grey levels, brightest 255.
    np.testing.assert_array_equal(as_rows(*both), as_rows(np.round(images * 255 / 16), classes))


def test_every_fifth_digit_of_a_class_is_held_out():
    images, classes = load_digits(return_X_y=True)
    held_out = everything("held_out")
    np.testing.assert_array_equal(np.bincount(held_out["label"]), np.bincount(classes) // 5)
    fifth = images[np.flatnonzero(classes == 3)[4]]
    first = held_out["stored"][held_out["label"] == 3][0]
    np.testing.assert_array_equal(first.ravel(), np.round(fifth * 255 / 16))


def test_digits_come_as_bytes_with_small_labels_in_the_order_asked():
    source = Digits("train")
    batch, whole = source.batch(np.array([7, 3, 3])), everything("train")
    assert batch["stored"].shape == (3, *source.stored_shape) == (3, 8, 8, 1)
    assert batch["stored"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["stored"], whole["stored"][[7, 3, 3]])
    np.testing.assert_array_equal(batch["label"], whole["label"][[7, 3, 3]])
    assert set(whole["label"].tolist()) == set(range(source.num_classes))


def test_only_the_training_split_has_held_out_examples():
    assert Digits("train").held_out() == Digits("held_out")
    assert Digits("held_out").held_out() is None
    with pytest.raises(ValueError, match="split = 'test': must be one of train, held_out"):
        Digits("test")


LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
identity = Identity()


def test_every_grey_level_survives_the_identity_codec():
    latents = identity.latent(jnp.asarray(LEVELS), jax.random.key(0))
    assert latents.dtype == jnp.float32
    assert (float(latents.min()), float(latents.max())) == (-1, 1)
    np.testing.assert_array_equal(identity.decode(latents), LEVELS)
    assert identity.latent_shape((16, 16, 1)) == latents.shape[1:]


@pytest.mark.parametrize("offset, level", [(-0.49, 0), (0.49, 0), (0.51, 1)])
def test_decoding_rounds_to_the_nearest_grey_level(offset, level):
    latents = (jnp.asarray(LEVELS[:, 1:-1], jnp.float32) + offset) / 127.5 - 1
    np.testing.assert_array_equal(identity.decode(latents), LEVELS[:, 1:-1] + level)


def test_decoding_clamps_what_lies_outside():
    latents = jnp.array([-5.0, -1.01, 1.01, 5.0]).reshape(1, 2, 2, 1)
    assert identity.decode(latents).ravel().tolist() == [0, 0, 255, 255]


SHAPE = (16, 16, 3)


def noise(indices, seed: int = 0, address: int = prng.LATENTS) -> np.ndarray:
    return np.asarray(
        prng.sample_normal(prng.sample_keys(seed, jnp.asarray(indices)), SHAPE, address)
    )


def test_sample_noise_depends_on_its_index_alone():
    whole = noise([0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(noise([5, 2, 9, 0, 8, 7])[[0, 1, 3]], whole[[5, 2, 0]])
    np.testing.assert_array_equal(noise([3]), whole[[3]])


def test_sample_noise_is_the_same_on_two_devices():
    rows = NamedSharding(Mesh(np.array(jax.devices()[:2]), "data"), PartitionSpec("data"))
    on_two = jax.jit(
        lambda i: prng.sample_normal(prng.sample_keys(0, i), SHAPE, prng.LATENTS),
        in_shardings=rows,
        out_shardings=rows,
    )(jnp.arange(6))
    assert len(on_two.sharding.device_set) == 2
    np.testing.assert_array_equal(on_two, noise(range(6)))


def test_samples_seeds_and_steps_draw_apart():
    draws = [x for seed in (0, 1) for step in (0, 2, 3) for x in noise(range(6), seed, step)]
    assert len({draw.tobytes() for draw in draws}) == len(draws) == 36
    assert prng.LATENTS != prng.LABEL and prng.FIRST_STEP > max(prng.LATENTS, prng.LABEL)


def test_sample_noise_is_standard_normal():
    draws = noise(range(6)).astype(np.float64)
    assert draws.shape == (6, *SHAPE)
    for power, (moment, variance) in {1: (0, 1), 2: (1, 2), 4: (3, 96)}.items():
        assert abs(np.mean(draws**power) - moment) < 5 * np.sqrt(variance / draws.size), power


def test_random_labels_fill_all_classes_evenly_and_leave_out_the_null_class():
    keys = prng.sample_keys(0, jnp.arange(2000))
    labels = prng.sample_labels(keys, 10)
    counts = np.bincount(labels)
    assert counts.shape == (10,)
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(200 * 0.9))
    np.testing.assert_array_equal(prng.sample_labels(keys[::-1], 10), labels[::-1])


def test_every_seed_stream_and_step_is_an_address_of_its_own():
    streams = ("init", "train", "codec", "sample")
    keys = [prng.key(seed, s, step) for seed in (0, 1) for s in streams for step in (0, 1, 2)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
    traced = jax.jit(lambda step: prng.key(0, "train", step))(jnp.int32(2))
    assert jax.random.key_data(traced).tolist() == jax.random.key_data(keys[5]).tolist()
