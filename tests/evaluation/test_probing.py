"""Probing finds what was planted, where it was planted; goes on after a kill; refuses."""

import dataclasses

import jax
import numpy as np
import planted
import pytest
from planted import BLOCKS, TIMES, Planted

from ig_jax.checkpoint.state_file import StateFile
from ig_jax.errors import UserError
from ig_jax.evaluation import prober as prober_module
from ig_jax.evaluation.probing import Share, probe_grid

CELL = (1, 0)  # t = 0.1, block 2


@pytest.fixture(scope="module")
def found():
    train, test = Planted(700, CELL), Planted(401, CELL, seed=1)
    prober = planted.prober(learning_rate=0.03, norm="batch", bank=300, epochs=5.0)
    return probe_grid(prober, train, test)


def test_the_planted_signal_is_found_where_it_is(found):
    assert (found.time, found.block) == (TIMES[CELL[0]], BLOCKS[CELL[1]])
    assert found.chosen.accuracy == found.validation[CELL] > 0.9
    assert found.test.images == 401 and found.test.accuracy > 0.9
    assert found.neighbours.images == 401 and found.neighbours.accuracy > 0.9


def test_elsewhere_is_chance(found):
    """A third of 140 images, within three standard deviations."""
    elsewhere = np.delete(found.validation.ravel(), np.ravel_multi_index(CELL, (3, 2)))
    np.testing.assert_allclose(elsewhere, 1 / 3, atol=0.12)
    assert found.trained_on == 560 and found.chosen.images == 140


def test_nothing_is_found_where_nothing_was_planted():
    prober = planted.prober(bank=300, epochs=3.0)
    found = probe_grid(prober, Planted(600, None), Planted(400, None, seed=1))
    for share in (found.test, found.neighbours):
        low, high = share.interval
        assert low < 1 / 3 < high


@pytest.mark.slow
def test_two_devices_find_what_one_does():
    states = []
    for devices in (jax.devices()[:1], jax.devices()[:2]):
        prober = planted.prober(devices, norm="batch", epochs=3.0)
        states.append(prober.train(Planted(200, CELL)))
        assert prober.right(states[-1], Planted(77, CELL, seed=1)).shape == (3, 2)
    one, two = map(jax.device_get, states)
    assert int(one.step) == int(two.step) == 19
    assert np.abs(one.heads["kernel"]).max() > 0.005
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_probe_ends_with_the_same_bits(tmp_path, monkeypatch):
    settings = {"epochs": 4.0, "norm": "batch", "save_every_steps": 5}
    source, steps, batches = Planted(200, CELL), 25, prober_module.loader.batches
    unbroken = jax.device_get(planted.prober(**settings).train(source))
    assert int(unbroken.step) == steps
    file, done = StateFile(tmp_path / "state.npz"), []
    for killed_at in (7, 13):

        def some(*args, left=killed_at, **kwargs):
            for number, rows in enumerate(batches(*args, **kwargs), kwargs["start"] // args[1]):
                if number == left:
                    raise Killed
                yield rows

        with monkeypatch.context() as patch:
            patch.setattr(prober_module.loader, "batches", some)
            with pytest.raises(Killed):
                planted.prober(**settings).train(source, file)
        like = jax.eval_shape(planted.prober(**settings)._probes(200).init)
        done.append(int(file.load(like).step))
    assert done == [5, 10]
    resumed = jax.device_get(planted.prober(**settings).train(source, file))
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)
    again = jax.device_get(planted.prober(**settings).train(source, file))
    jax.tree.map(np.testing.assert_array_equal, again, unbroken)


def test_a_damaged_state_is_made_again(tmp_path, capsys):
    settings = {"epochs": 1.0, "save_every_steps": 2}
    source, file = Planted(200, CELL), StateFile(tmp_path / "state.npz")
    expected = jax.device_get(planted.prober(**settings).train(source, file))
    content = file.path.read_bytes()
    file.path.write_bytes(content[: len(content) // 2])
    found = jax.device_get(planted.prober(**settings).train(source, file))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert "state.npz: cannot be gone on from" in capsys.readouterr().out
    file.remove()
    assert file.load(expected) is None


def test_an_accuracy_does_not_depend_on_the_size_of_batches():
    source = Planted(77, CELL, seed=1)
    state = planted.prober(epochs=3.0).train(Planted(200, CELL))
    counts = [planted.prober(batch_size=n).right(state, source) for n in (32, 13)]
    np.testing.assert_array_equal(*counts)
    assert counts[0].max() > 50


def test_wilson_s_interval_is_that_of_the_textbook():
    low, high = Share(9, 10).interval
    assert (round(low, 4), round(high, 4)) == (0.5958, 0.9821)
    assert Share(10, 10).interval[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "settings, images, sentence",
    [
        ({}, 1, "data.source: holds 1 examples: two parts need at least two"),
        ({"batch_size": 64}, 70, "probe.batch_size = 64: must not exceed the 56 images that 14 of"),
        ({"neighbours": 57}, 70, "probe.neighbours = 57: must not exceed the 56 images among"),
        ({"bank": 19}, 70, "probe.neighbours = 20: must not exceed the 19 images among"),
    ],
)
def test_too_few_images_are_refused(settings, images, sentence):
    with pytest.raises(UserError, match=sentence):
        probe_grid(planted.prober(**settings), Planted(images, CELL), None)


def test_a_batch_that_does_not_divide_over_devices_is_refused():
    prober = planted.prober(jax.devices()[:2], batch_size=33)
    with pytest.raises(UserError, match="probe.batch_size = 33: must divide over 2 devices; .* 34"):
        probe_grid(prober, Planted(70, CELL), None)


def test_one_class_is_refused():
    source = Planted(70, CELL)
    source.num_classes = 1
    with pytest.raises(UserError, match="data.source.num_classes = 1: a probe needs images of two"):
        probe_grid(planted.prober(), source, None)


def test_features_that_are_not_finite_are_named():
    source = Planted(200, CELL)
    source.stored[:, 2, 1] = np.inf
    with pytest.raises(UserError, match=r"probe: block 5 at t = 0.6 has features, or its"):
        probe_grid(dataclasses.replace(planted.prober(epochs=0.5)), source, None)
