"""Every row of docs/reproduce.md is set to the labels and the guidance that it states."""

import re
import shlex

import commands
import jax
import pytest
from places import ROOT

from ig_jax import experiment, modes
from ig_jax.config import run_config

# ml_collections reads a config file in a way that Python 3.12 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def rows() -> list[dict[str, str]]:
    lines = (ROOT / "docs" / "reproduce.md").read_text().splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    head, _, *rest = cells
    return [dict(zip(head, row, strict=True)) for row in rest]


def test_rows_are_found_and_every_number_is_one():
    assert len(rows()) >= 25
    for row in rows():
        assert float(row["FID"]) > 1 and int(row["GPU hours"]) > 0
        assert re.fullmatch(r"`--config=[^`]+`", row["flags"])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["flags"].strip("`"))
def test_a_row_is_set_to_what_it_states(row, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(modes, "run", lambda c, **given: started.append(c))
    flags = shlex.split(row["flags"].strip("`"))
    assert commands.run_here(flags, monkeypatch) == 0, capsys.readouterr().err
    parsed = run_config.parse(started[0], jax.device_count())
    found = (parsed.sample.labels, parsed.sample.cfg.scale, parsed.sample.ig.scale)
    assert found == (row["labels"], float(row["CFG"]), float(row["IG"]))
    text = (ROOT / flags[0].removeprefix("--config=").partition(":")[0]).read_text()
    assert row["FID"] in text  # the config says so, too


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["flags"].strip("`"))
def test_a_row_is_trained_as_long_as_it_states(row, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(modes, "run", lambda c, **given: started.append(c))
    assert commands.run_here(shlex.split(row["flags"].strip("`")), monkeypatch) == 0
    exp = experiment.experiment(run_config.parse(started[0], jax.device_count()))
    told = re.search(r"([\d.]+)(M|k) steps|(\d+) epochs|the same|its base", row["paper, row"])
    assert told, row
    steps = exp.total_steps
    if told[1]:
        assert steps == float(told[1]) * {"M": 1e6, "k": 1e3}[told[2]]
    elif told[3] and not told[3] == "80":  # 400 000 steps, as those papers count
        assert steps == pytest.approx(
            int(told[3]) * 1_281_167 / exp.config.train.batch_size, rel=0.01
        )
    elif told[3]:
        assert steps == pytest.approx(400_000, rel=0.01)
