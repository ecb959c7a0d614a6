"""The table, the ranking and the record of planted runs."""

import json

import numpy as np
import pytest
from PIL import Image

from ig_jax.study import report

PLAIN = [(1.10, 0.70), (1.30, 0.66), (1.17, 0.71)]
BETTER = [(1.00, 0.71), (1.22, 0.65), (1.06, 0.73)]  # FD falls by 0.1, 0.08, 0.11


def runs(pairs, flops, seconds):
    cost = {"train_flops": flops, "train_seconds": seconds}
    return [{"fd": fd, "precision": precision, **cost} for fd, precision in pairs]


ROWS = {"none": runs(PLAIN, 2e15, 30.0), "sra": runs(BETTER, 2.5e15, 33.0)}


def test_the_table_holds_means_paired_differences_and_cost():
    found = report.table(ROWS, "none", ["fd", "precision"], {"fd": 0.5625, "precision": 0.93})
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in found.split("\n")]
    # By hand: s of 0.1, 0.08, 0.11 is 0.015275, times 4.302653 / sqrt(3) is 0.03795.
    assert cells == [
        ["n = 3 seeds", "FD", "precision %", "training FLOPs", "training s"],
        ["-" * 13, "-" * 34, "-" * 24, "-" * 17, "-" * 10],
        ["held-out data", "0.562", "93.0", "", ""],
        ["none", "1.190 ± 0.252", "69.0 ± 6.6", "2 PFLOP (1.00×)", "30 (1.00×)"],
        [
            "sra",
            "1.093 ± 0.283 (**-0.097 ± 0.038**)",
            "69.7 ± 10.3 (+0.7 ± 3.8)",
            "2.5 PFLOP (1.25×)",
            "33 (1.10×)",
        ],
    ]


def test_candidates_are_ranked_by_the_way_the_measure_is_better():
    assert report.ranked(ROWS, "fd", "lower") == ["sra", "none"]
    assert report.ranked(ROWS, "fd", "higher") == ["none", "sra"]
    broken = ROWS | {"nan": runs([(np.nan, 0.1)] * 3, 1.0, 1.0)}
    assert report.ranked(broken, "fd", "lower")[-1] == "nan"
    assert report.ranked(broken, "fd", "higher")[-1] == "nan"


def test_the_ranking_shows_the_difference_from_the_config_s_own():
    found = report.ranking(ROWS, ["sra", "none"], "none", "fd").split("\n")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in found]
    assert cells[0] == ["rank", "candidate", "FD", "minus config", "training FLOPs"]
    assert cells[2] == ["1", "sra", "1.093 ± 0.283", "**-0.097 ± 0.038**", "2.5 PFLOP (1.25×)"]
    assert cells[3] == ["2", "none (config)", "1.190 ± 0.252", "", "2 PFLOP (1.00×)"]


def test_the_record_is_json_and_holds_every_run():
    found = json.loads(json.dumps(report.record(ROWS, "none", (4, 0, 2), ["fd"])))
    assert found["baseline"] == "none" and found["seeds"] == [4, 0, 2]
    sra = found["methods"]["sra"]
    assert sra["runs"] == ROWS["sra"]
    assert sra["measures"]["fd"]["minus_baseline"]["mean"] == pytest.approx(-0.29 / 3)
    assert found["methods"]["none"]["measures"]["fd"]["minus_baseline"] is None


def test_a_probe_of_a_block_has_its_heading():
    assert report.shown("probe_4_0.1") == ("linear probe %, block 4, t = 0.1", 1, 100.0)


def test_the_plot_shows_something(tmp_path):
    report.draw(tmp_path / "study.png", ROWS, "none", ["fd", "precision"])
    picture = np.asarray(Image.open(tmp_path / "study.png").convert("RGB"))
    assert min(picture.shape[:2]) > 100 and picture.std() > 5
