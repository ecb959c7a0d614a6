"""--mode=search on the tiny run: what it measures, writes, resumes and refuses."""

import copy
import json
from types import MappingProxyType

import jax
import pytest
import tiny

from ig_jax import experiment, modes
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.evaluation import image_evaluator
from ig_jax.generation import variants
from ig_jax.programs import run_record, search
from ig_jax.search.space import Candidate

SPACE = {"method": "grid", "candidates": 4, "values": {"ig": {"scale": (1.0, 2.0, 3.0)}}}


def settings(changes=MappingProxyType({})):
    """The tiny config with a small search, and changes."""
    small = {"search.num": 20, "search.rounds": 2, "search.space": copy.deepcopy(SPACE)}
    return tiny.settings(small | changes)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The rows of a search in a copy of the tiny run, and its workdir."""
    workdir = tiny.trained().copy(tmp_path_factory.mktemp("search"))
    return modes.run(settings(), workdir=str(workdir), mode="search"), workdir


def test_rows_are_written_with_a_picture_and_hold_the_config_s_own_setting(found):
    rows, workdir = found
    record = json.loads((workdir / "search.json").read_text())
    assert record["rows"] == json.loads(json.dumps(rows))
    assert (workdir / "search.png").stat().st_size > 5000
    [own] = [row for row in rows if row["default"]]
    assert own["candidate"] == {"ig.scale": 2.0} and own["seeds"] == 2


def test_a_measurement_is_that_of_evaluation_with_the_same_samples(found):
    rows, workdir = found
    exp = experiment.experiment(run_config.parse(settings(), jax.device_count()))
    c = exp.config
    _, params = run_record.load_weights(exp, workdir)
    evaluator, _ = image_evaluator.make_evaluator(exp.config, exp.mesh)
    [row] = [row for row in rows if row["candidate"] == {"ig.scale": 3.0}]
    guidances, sampler, *_ = search.apply_candidate(c.sample, Candidate.of(row["candidate"]), ())

    class Bar:
        def update(self, n): ...

    for value in row["values"]:
        images, labels = variants.draw_samples(
            exp.pipeline.generator(), params, 20, value["seed"], Bar(), guidances=guidances
        )
        found = evaluator.compute(evaluator.extract(images), labels)
        assert found == {k: v for k, v in value.items() if k != "seed"}
    assert sampler == c.sample.sampler


def test_a_finished_search_draws_nothing_again(found, monkeypatch):
    rows, workdir = found
    monkeypatch.setattr(variants, "draw_samples", lambda *a, **k: pytest.fail("drew again"))
    again = modes.run(settings(), workdir=str(workdir), mode="search")
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(rows))


def test_a_search_with_other_settings_is_refused_and_the_record_kept(found):
    _, workdir = found
    before = (workdir / "search.json").read_bytes()
    with pytest.raises(UserError, match="search.json: was made with other settings .*search.num"):
        modes.run(settings({"search.num": 21}), workdir=str(workdir), mode="search")
    assert (workdir / "search.json").read_bytes() == before


def test_a_candidate_changes_what_it_names_and_nothing_else():
    s = tiny.experiment().config.sample
    values = {"ig.scale": 3.0, "cfg.low": 0.25, "sampler.num_steps": 7.0}
    guidances, sampler, *_ = search.apply_candidate(s, Candidate.of(values), (1,))
    assert sampler.num_steps == 7 and isinstance(sampler.num_steps, int)
    assert guidances["ig"].scale == 3 and guidances["ig"].high == s.ig.high
    assert guidances["cfg"].low == 0.25 and guidances["cfg"].scale == s.cfg.scale


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"search.metric": "nearest"}, "search.metric = 'nearest': must be one of fd, accuracy"),
        ({"search.space.values": {"ig": {"size": (1.0,)}}}, "sample.ig.size is no number; known"),
        ({"search.space.method": "guess"}, "search.space.method = 'guess': must be grid or random"),
        ({"search.space.values": {"ig": {"scale": 2.0}}}, "values.ig.scale = 2.0: must be a tuple"),
        ({"search.rounds": 0}, "search.rounds = 0: must be at least 1"),
        ({"search.keep": 0.0}, "search.keep = 0.0: must lie in"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        workdir = tiny.trained().copy(tmp_path / "run")
        modes.run(settings(changes), workdir=str(workdir), mode="search")
