"""--mode=ema on a tiny run: averages of other lengths, composed of those it stored."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

import ig_jax
from ig_jax import modes
from ig_jax.checkpoint import composed_average, stored_averages
from ig_jax.checkpoint.manager import Checkpoints
from ig_jax.errors import UserError
from ig_jax.optim import ema
from ig_jax.training import trainer as train

STORES = {
    "train.ema_sigma_rel": (0.05, 0.1),
    "checkpoint.averages_every_steps": 2,
    "train.steps": 20,
}


def settings(**changes):
    return tiny.settings({**STORES, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, parameters after every step, the last state) of a run that stores averages."""
    workdir = tmp_path_factory.mktemp("stores") / "run"
    every_step = {**STORES, "train.steps_per_dispatch": 1}
    trainer = train.Trainer(tiny.experiment(every_step), workdir)
    dispatch, seen = trainer.dispatch, []

    def noting(*args):
        state, metrics = dispatch(*args)
        seen.append(jax.tree.map(np.array, jax.device_get(state.params)))
        return state, metrics

    trainer.dispatch = noting
    state = trainer.run().state
    trainer.close()
    return workdir, seen, state


@pytest.fixture
def workdir(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "run")


def composed(workdir, name, **changes):
    modes.run(settings(**{"sample.weights": name, **changes}), workdir=workdir, mode="ema")


@pytest.mark.slow
def test_averages_are_stored_alone_at_their_steps(run):
    workdir, _, state = run
    stored = stored_averages.opened(workdir, reading=True)
    assert stored.all_steps() == [*range(2, 21, 2)]
    assert sorted(p.name for p in (workdir / "averages" / "20").iterdir() if p.is_dir()) == [
        "ema",
        "meta",
    ]
    names = ["sigma_rel_0.05", "sigma_rel_0.1"]
    found = stored.averages(20, names, tiny.experiment(STORES).replicated_params)
    stored.close()
    for name in names:
        jax.tree.map(np.testing.assert_array_equal, found[name], state.ema[name])


@pytest.mark.slow
def test_a_composed_average_is_that_of_the_whole_run_and_is_sampled_with(run, workdir, capsys):
    _, seen, state = run
    composed(workdir, "sigma_rel_0.075")
    said = capsys.readouterr().out
    assert "sigma_rel_0.075 at step 20, of 20 averages at 10 steps; 0." in said
    expected = ema.init(seen[0], ["sigma_rel_0.075"])
    for step, params in enumerate(seen):
        expected = ema.update(expected, params, step)
    expected = expected["sigma_rel_0.075"]
    checkpoints = Checkpoints(workdir, reading=True)
    like = tiny.experiment(STORES).replicated_params
    found = checkpoints.weights(20, "sigma_rel_0.075", like)
    checkpoints.close()

    def distance(a, b):
        return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))

    nearest = min(distance(expected, state.ema[f"sigma_rel_{s}"]) for s in ("0.05", "0.1"))
    assert distance(expected, found) < nearest / 5
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, like)
    with_it = settings(**{"sample.weights": "sigma_rel_0.0750"})
    modes.run(with_it, workdir=workdir, mode="sample")
    [folder] = (workdir / "samples").iterdir()
    assert json.loads((folder / "settings.json").read_text())["weights"] == "sigma_rel_0.0750"


@pytest.mark.slow
def test_what_is_stored_in_every_checkpoint_is_not_composed(workdir, capsys):
    composed(workdir, "sigma_rel_0.05")
    assert "every checkpoint of the run holds it" in capsys.readouterr().out
    assert not (workdir / "ema").exists()


@pytest.mark.slow
def test_what_is_not_composed_yet_names_the_command(workdir):
    with pytest.raises(UserError, match="--mode=ema .*--config.sample.weights=sigma_rel_0.08"):
        modes.run(settings(**{"sample.weights": "sigma_rel_0.08"}), workdir=workdir, mode="sample")


@pytest.mark.slow
def test_going_back_forgets_what_is_stored_and_composed_of_later_steps(workdir):
    composed(workdir, "sigma_rel_0.2")
    shutil.rmtree(workdir / "checkpoints" / "20")
    trainer = train.Trainer(tiny.experiment(STORES), workdir)
    assert trainer.step == 18
    assert trainer._averages._stored.all_steps() == [*range(2, 19, 2)]
    assert [*(workdir / "ema").iterdir()] == []
    trainer.run()
    trainer.close()
    stored = stored_averages.opened(workdir, reading=True)
    assert stored.all_steps() == [*range(2, 21, 2)]
    stored.close()


@pytest.mark.slow
def test_a_damaged_file_is_composed_again(workdir, capsys):
    composed(workdir, "sigma_rel_0.2")
    [file] = (workdir / "ema").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="not composed yet"):
        modes.run(settings(**{"sample.weights": "sigma_rel_0.2"}), workdir=workdir, mode="sample")
    composed(workdir, "sigma_rel_0.2")
    assert file.stat().st_size == len(whole)


@pytest.mark.slow
def test_few_stored_averages_are_warned_of(workdir, capsys):
    for step in range(2, 20, 2):
        shutil.rmtree(workdir / "averages" / str(step))
    composed(workdir, "sigma_rel_0.24")
    assert "; store averages more often, or choose a length nearer" in capsys.readouterr().out


@pytest.mark.slow
def test_a_damaged_store_is_left_out_with_a_line(workdir, capsys):
    (workdir / "averages" / "8" / "meta" / "metadata").write_text("{")
    composed(workdir, "sigma_rel_0.2")
    said = capsys.readouterr().out
    assert "averages/8 cannot be read (meta/metadata " in said and "of 18 averages at 9" in said


@pytest.mark.slow
def test_python_opens_it_by_its_name_and_refuses_a_number(workdir):
    composed(workdir, "sigma_rel_0.2")
    by_length = ig_jax.load(workdir, weights="sigma_rel_0.2")
    [file] = (workdir / "ema").iterdir()
    like = tiny.experiment(STORES).abstract_params
    saved = composed_average.state_file(workdir, 20, "sigma_rel_0.2").load(like)
    jax.tree.map(np.testing.assert_array_equal, by_length.params, saved)
    for odd in (0.2, "sigma_rel_0.9", None):
        with pytest.raises(UserError, match="weights = .*: must be one of ema, raw, 0.9, 0.8"):
            ig_jax.load(workdir, weights=odd)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "raw", "0.9"])
def test_what_is_no_length_is_refused(workdir, weights):
    with pytest.raises(UserError, match=r"must name the length to compose in --mode=ema"):
        composed(workdir, weights)


def test_a_run_without_stored_averages_is_refused(tmp_path):
    workdir = tiny.trained().copy(tmp_path / "run")
    with pytest.raises(UserError, match="its training stored no averages; train with"):
        composed(workdir, "sigma_rel_0.08")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.ema_sigma_rel": (0.05,)}, "needs two lengths or more"),
        ({"train.ema_sigma_rel": (0.05, 0.3)}, r"in \[0.005, 0.25\]"),
        ({"train.ema_sigma_rel": (0.05, 0.05)}, "each once"),
        ({"train.ema_sigma_rel": (0.05, float("nan"))}, "ema_sigma_rel"),
        ({"checkpoint.averages_every_steps": 0}, "set both"),
        ({"train.ema_sigma_rel": ()}, "set both"),
        ({"checkpoint.averages_every_steps": -1}, "must not be negative"),
        ({"sample.weights": "sigma_rel_0.5"}, "sigma_rel_ and a length, such as sigma_rel_0.08"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny.experiment({**STORES, **changes})


@pytest.mark.slow
def test_a_search_over_lengths_composes_what_it_needs_and_samples_with_it(workdir):
    changes = {
        "sample.weights": "sigma_rel_0.05",
        **{"search.num": 20, "search.rounds": 1},
        "search.space": {
            **{"method": "grid", "candidates": 1},
            "values": {"sigma_rel": (0.05, 0.07, 0.1), "ig": {"scale": (2.0,)}},
        },
    }
    rows = modes.run(settings(**changes), workdir=workdir, mode="search")
    assert [p.name for p in (workdir / "ema").iterdir()] == ["step_00000020_sigma_rel_0.07.npz"]
    by_length = {row["candidate"]["sigma_rel"]: row for row in rows}
    assert sorted(by_length) == [0.05, 0.07, 0.1] and by_length[0.05]["default"]
    assert len({row["fd"]["mean"] for row in rows}) == 3
    alone = {**changes, "sample.weights": "sigma_rel_0.07"}
    alone["search.space"] = {**changes["search.space"], "values": {"ig": {"scale": (2.0, 3.0)}}}
    (workdir / "search.json").unlink()
    again = modes.run(settings(**alone), workdir=workdir, mode="search")
    [own] = [row for row in again if row["default"]]
    assert own["fd"] == by_length[0.07]["fd"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights, lengths, message",
    [
        ("ema", (0.05,), "sigma_rel: a search over averages begins at the config's own; name one"),
        ("sigma_rel_0.05", (0.05, 0.5), "sigma_rel=0.5: must be 0.005 to 0.25"),
    ],
)
def test_a_search_over_no_lengths_is_refused(workdir, weights, lengths, message):
    space = {"method": "grid", "candidates": 1, "values": {"sigma_rel": lengths}}
    with pytest.raises(UserError, match=message):
        changes = {"sample.weights": weights, "search.space": space}
        modes.run(settings(**changes), workdir=workdir, mode="search")
