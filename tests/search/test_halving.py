"""Halving on a bowl with known optimum and noise, so that what it must find is known."""

import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image
from tiers import slow_but

from ig_jax.errors import UserError
from ig_jax.search import report as search_report
from ig_jax.search.space import Candidate, Space, candidates
from ig_jax.search.successive_halving import Halving, Search

OWN = {"ig.scale": 1.4, "ig.low": 0.0, "ig.high": 1.0}
OWN |= {"cfg.scale": 1.35, "cfg.low": 0.0, "cfg.high": 0.7, "sampler.num_steps": 50}
BOWL = {
    "ig.scale": (1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6),
    "cfg.scale": (1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8),
}
BEST = Candidate.of({"ig.scale": 2.0, "cfg.scale": 1.5})
SMALL = Space({"ig.scale": (1.2, 1.6, 2.0, 2.4), "cfg.scale": (1.3, 1.4, 1.5, 1.6)}, "grid", 0)
HALVING = Halving(metric="fd", better="lower", rounds=4, keep=0.5, first_seed=7)


def grid(**values):
    return Space({name.replace("_", ".", 1): v for name, v in values.items()}, "grid", 0)


def bowl_depth(candidate: Candidate) -> float:
    v = candidate.values
    return 2 + 20 * (v["ig.scale"] - 2.0) ** 2 + 50 * (v["cfg.scale"] - 1.5) ** 2


class Bowl:
    """A noisy bowl: noise that all settings share on a seed, and a little of each one's own."""

    def __init__(self, own_noise=0.15, fails_at=None):
        self.calls, self.own_noise, self.fails_at = [], own_noise, fails_at

    def __call__(self, candidate, seed):
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append((candidate, seed))
        shared = 3 * np.random.default_rng(seed).normal()
        own = np.random.default_rng([seed, *str(candidate).encode()]).normal()
        fd = bowl_depth(candidate) + shared + self.own_noise * own
        return {"fd": float(fd), "accuracy": float(-fd)}


def searched(path, measure, halving=HALVING, space=None, settings=None):
    compared = candidates(space or SMALL, 0, OWN)
    search = Search(path, compared, halving, settings or {"step": 100})
    list(search.run(measure))
    return search


def by_seed(calls):
    return {seed: [c for c, s in calls if s == seed] for _, seed in calls}


def test_halving_finds_the_bottom_of_a_noisy_bowl_at_a_third_of_the_cost(tmp_path):
    bowl = Bowl()
    search = searched(tmp_path / "search.json", bowl, space=Space(BOWL, "grid", 0))
    assert search.rows()[0]["candidate"] == BEST.values
    assert len(bowl.calls) == search.total == search.finished
    # 64 settings and the config's own: 65 + 33 + 2 * 17 + 4 * 9 of 65 * 8 measurements.
    assert search.total == 168 < 65 * 8 / 3


@pytest.mark.slow
def test_the_number_of_measurements_is_known_before_for_every_share_kept(tmp_path):
    for number, (keep, rounds) in enumerate(itertools.product((0.1, 1 / 3, 0.5, 1.0), (1, 2, 4))):
        bowl = Bowl()
        halving = Halving("fd", "lower", rounds, keep, 0)
        space = grid(ig_scale=tuple(np.linspace(1.1, 3, 15).tolist()), cfg_scale=(1.5,))
        search = searched(tmp_path / f"{number}.json", bowl, halving, space)
        assert len(bowl.calls) == search.total


def test_a_share_that_rounding_lifts_above_a_whole_number_keeps_that_number():
    assert 0.07 * 100 > 7
    assert Halving("fd", "lower", 2, 0.07, 0).kept(100) == 7
    assert Halving("fd", "lower", 2, 0.07, 0).kept(1) == 1


@pytest.mark.parametrize(
    ("keep", "challengers", "kept"),
    [(0.5, 15, 8), (0.5, 1, 1), (1 / 3, 16, 6), (1 / 3, 15, 5), (0.1, 15, 2), (1.0, 7, 7)],
)
def test_the_share_that_goes_on_is_rounded_up(keep, challengers, kept):
    assert Halving("fd", "lower", 2, keep, 0).kept(challengers) == kept


def test_a_search_over_an_odd_number_of_settings_drops_the_smaller_half(tmp_path):
    bowl = Bowl()
    halving = Halving("fd", "lower", rounds=2, keep=0.5, first_seed=0)
    space = grid(ig_scale=(1.2, 1.4, 1.6, 1.8, 2.2), cfg_scale=(1.5,))
    searched(tmp_path / "search.json", bowl, halving, space)
    challengers = len(by_seed(bowl.calls)[0]) - 1
    assert challengers % 2 == 1
    assert len(by_seed(bowl.calls)[1]) - 1 == (challengers + 1) // 2


def test_all_settings_of_a_round_get_the_same_seeds_and_none_twice(tmp_path):
    bowl = Bowl()
    search = searched(tmp_path / "search.json", bowl)
    assert len(set(bowl.calls)) == len(bowl.calls)
    on = by_seed(bowl.calls)
    assert list(on) == [*range(7, 15)]
    rounds = [on[7], on[8], on[9], on[11]]
    assert [len(r) for r in rounds] == [17, 9, 5, 3]
    assert on[9] == on[10] and on[11] == on[12] == on[13] == on[14]
    assert all(set(later) < set(former) for former, later in itertools.pairwise(rounds))
    assert sorted(row["seeds"] for row in search.rows()) == [1] * 8 + [2] * 4 + [4] * 2 + [8] * 3


def test_a_setting_is_measured_on_all_its_seeds_of_a_round_in_a_row(tmp_path):
    bowl = Bowl()
    searched(tmp_path / "search.json", bowl)
    runs = [candidate for candidate, _ in itertools.groupby(bowl.calls, key=lambda call: call[0])]
    assert len(runs) == 17 + 9 + 5 + 3


def test_the_configs_own_setting_reaches_the_last_round_even_when_it_is_the_worst(tmp_path):
    own = OWN | {"ig.scale": 9.0}
    compared = candidates(SMALL, 0, own)
    search = Search(tmp_path / "search.json", compared, HALVING, {})
    list(search.run(Bowl()))
    (row,) = (row for row in search.rows() if row["default"])
    assert row["candidate"]["ig.scale"] == 9.0
    assert (row["seeds"], row["dropped_after_round"]) == (8, None)


def test_those_dropped_are_the_worst_of_their_round(tmp_path):
    search = searched(tmp_path / "search.json", Bowl())
    for round_, seeds in ((1, 1), (2, 2), (3, 4)):
        alive = [
            r
            for r in search.rows()
            if not r["default"] and (r["dropped_after_round"] or 9) >= round_
        ]
        means = {
            dropped: [
                np.mean([v["fd"] for v in r["values"][:seeds]])
                for r in alive
                if (r["dropped_after_round"] == round_) is dropped
            ]
            for dropped in (True, False)
        }
        assert min(means[True]) > max(means[False])


def test_pairing_removes_the_noise_that_settings_share(tmp_path):
    row = searched(tmp_path / "search.json", Bowl(own_noise=0.15)).rows()[0]
    truth = bowl_depth(BEST) - bowl_depth(
        Candidate.of({"ig.scale": OWN["ig.scale"], "cfg.scale": OWN["cfg.scale"]})
    )
    difference = row["minus_default"]
    assert row["fd"]["error"] > 0.5
    assert 0.02 < difference["error"] < 0.15  # 0.15 * sqrt(2 / 8) = 0.075 expected
    assert abs(difference["mean"] - truth) < 4 * 0.075


def test_mean_std_and_error_are_those_of_the_sample(tmp_path):
    rows = searched(tmp_path / "search.json", Bowl()).rows()
    values = [v["fd"] for v in rows[0]["values"]]
    assert rows[0]["fd"]["mean"] == pytest.approx(np.mean(values))
    assert rows[0]["fd"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert rows[0]["fd"]["error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(8))
    assert rows[-1]["seeds"] == 1
    assert rows[-1]["fd"]["std"] is None and rows[-1]["minus_default"]["error"] is None


def test_rows_go_from_the_longest_in_the_race_to_the_first_dropped_then_by_mean(tmp_path):
    order = [(-row["seeds"], row["fd"]["mean"]) for row in searched(tmp_path / "s", Bowl()).rows()]
    assert order == sorted(order)


def test_a_measure_of_which_more_is_better_leads_to_the_same_race(tmp_path):
    lower = searched(tmp_path / "a.json", Bowl()).rows()
    halving = Halving("accuracy", "higher", 4, 0.5, 7)
    higher = searched(tmp_path / "b.json", Bowl(), halving).rows()
    assert [r["candidate"] for r in higher] == [r["candidate"] for r in lower]
    assert higher[0]["minus_default"]["mean"] == -lower[0]["minus_default"]["mean"] > 0


def test_equal_settings_are_kept_in_their_order(tmp_path):
    flat = searched(tmp_path / "search.json", lambda candidate, seed: {"fd": 1.0})
    challengers = [r["candidate"] for r in flat.rows() if r["seeds"] == 8 and not r["default"]]
    expected = [c.values for c in candidates(SMALL, 0, OWN)[1:3]]
    assert challengers == expected


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_measure_that_is_not_finite_loses(tmp_path, better, broken):
    def measure(candidate, seed):
        return {"fd": broken if candidate.values["ig.scale"] < 2.5 else 1.0}

    halving = Halving("fd", better, 2, 0.5, 0)
    space = grid(ig_scale=(1.2, 1.5, 2.0, 3.0))
    rows = searched(tmp_path / "search.json", measure, halving, space).rows()
    assert rows[0]["candidate"] == {"ig.scale": 3.0}


# 16 settings and the config's own: 17 + 9 + 2 * 5 + 4 * 3 measurements.
@pytest.mark.parametrize("fails_at", slow_but([10], [0, 1, 10, 17, 18, 25, 47]))
def test_a_search_that_was_cut_short_goes_on_where_it_was(tmp_path, fails_at):
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    searched(whole, Bowl())
    first, second = Bowl(fails_at=fails_at), Bowl()
    with pytest.raises(KeyboardInterrupt):
        searched(cut, first)
    compared = candidates(SMALL, 0, OWN)
    assert Search(cut, compared, HALVING, {"step": 100}).finished == fails_at
    searched(cut, second)
    assert len(first.calls) == fails_at and len(first.calls + second.calls) == 48
    assert not set(first.calls) & set(second.calls)
    assert cut.read_text() == whole.read_text()


def edited(path, edit):
    record = json.loads(path.read_text())
    edit(record)
    return json.dumps(record)


def values(new):
    return lambda record: record["rows"][0].update(values=new)


def seeds(record):
    for row in record["rows"]:
        for number, value in enumerate(row["values"]):
            value["seed"] = 99 + number


DAMAGE = {
    **{text[:20]: text for text in ("", "{", "[]", "null", "3", "[" * 100_000, "{}", "\0" * 99)},
    "settings": lambda record: record.update(settings=[]),
    "rows": lambda record: record.update(rows={}),
    "a row": lambda record: record["rows"].append(None),
    "twice": lambda record: record["rows"].append(record["rows"][0]),
    "candidate": lambda record: record["rows"][0].update(candidate=[1]),
    "of words": lambda record: record["rows"][0].update(candidate={"ig.scale": "x"}),
    "words": values("abc"),
    "nothing": values(None),
    "none": values([]),
    "numbers": values([1, 2]),
    "no measure": values([{"seed": 7}]),
    "a word": values([{"seed": 7, "fd": "x", "accuracy": 1.0}]),
    "other measures": values([{"seed": 7, "sfid": 1.0, "accuracy": 1.0}]),
    "other seeds": seeds,
    "a seed of another type": values([{"seed": 7.0, "fd": 1.0, "accuracy": 1.0}]),
}


@pytest.mark.parametrize("damage", slow_but(["{", "a row", "words", "other seeds"], DAMAGE))
def test_a_damaged_record_or_one_with_other_seeds_is_refused_and_kept(tmp_path, damage):
    path = tmp_path / "search.json"
    searched(path, Bowl(), Halving("fd", "lower", 1, 0.5, 7))
    change = DAMAGE[damage]
    path.write_text(change if isinstance(change, str) else edited(path, change))
    before = path.read_bytes()
    with pytest.raises(UserError, match="search.json: .*; remove it or choose another workdir"):
        searched(path, Bowl(fails_at=0), Halving("fd", "lower", 1, 0.5, 7))
    assert path.read_bytes() == before


def test_a_finished_search_measures_nothing_and_tells_the_same(tmp_path):
    former = searched(tmp_path / "search.json", Bowl())
    again = Bowl(fails_at=0)
    assert searched(tmp_path / "search.json", again).rows() == former.rows()


def test_the_record_is_whole_before_the_next_measurement(tmp_path):
    path = tmp_path / "search.json"
    search = Search(path, candidates(SMALL, 0, OWN), HALVING, {})
    for number, candidate in enumerate(search.run(Bowl()), 1):
        record = json.loads(path.read_text())
        assert sum(row["seeds"] for row in record["rows"]) == number
        assert candidate.values in [row["candidate"] for row in record["rows"]]
    assert [p.name for p in tmp_path.iterdir()] == ["search.json"]
    assert record["metric"] == "fd" and record["rows"] == search.rows()


def test_a_record_of_other_settings_is_refused_naming_what_differs(tmp_path):
    path = tmp_path / "search.json"
    searched(path, Bowl())
    before = path.read_text()
    with pytest.raises(
        UserError, match=r"search\.json: .*\(step: 100 there, 200 here\); remove it"
    ):
        searched(path, Bowl(), settings={"step": 200})
    with pytest.raises(UserError, match=r"\(halving\.rounds: 4 there, 3 here\)"):
        searched(path, Bowl(), Halving("fd", "lower", 3, 0.5, 7))
    with pytest.raises(UserError, match=r"has cfg\.scale=.*, not in this space"):
        searched(path, Bowl(), space=grid(ig_scale=(1.5,), cfg_scale=(2.0,)))
    assert path.read_text() == before


def test_tuples_in_the_settings_read_back_as_the_same(tmp_path):
    settings = {"space": {"values": BOWL}}
    searched(tmp_path / "search.json", Bowl(), settings=settings)
    searched(tmp_path / "search.json", Bowl(fails_at=0), settings=settings)


@pytest.mark.parametrize(
    "text", ["", '{"settings": {"st', "[]", "{}", '{"settings": 1, "rows": []}']
)
def test_a_record_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"search\.json: is no readable record") as caught:
        searched(path, Bowl())
    assert "\n" not in str(caught.value)
    assert path.read_text() == text


def test_a_metric_that_nobody_measures_is_refused_with_those_measured(tmp_path):
    with pytest.raises(UserError, match=r"metric = 'fid': .* choose one of fd, accuracy"):
        searched(tmp_path / "search.json", Bowl(), Halving("fid", "lower", 2, 0.5, 0))


def test_a_grid_is_every_combination_after_the_configs_own():
    found = candidates(grid(ig_scale=(1.2, 1.5), cfg_scale=(1.1, 2.0, 3.0)), 0, OWN)
    assert str(found[0]) == "cfg.scale=1.35 ig.scale=1.4"
    assert [tuple(c.values.values()) for c in found[1:]] == [
        *((1.1, 1.2), (1.1, 1.5), (2.0, 1.2), (2.0, 1.5), (3.0, 1.2), (3.0, 1.5))
    ]


def test_a_setting_listed_twice_or_equal_to_the_configs_own_is_compared_once():
    found = candidates(grid(ig_scale=(1.4, 1.2, 1.2)), 0, OWN)
    assert [c.values["ig.scale"] for c in found] == [1.4, 1.2]


def test_intervals_that_end_before_they_begin_are_left_out():
    found = candidates(grid(ig_low=(0.0, 0.3, 0.6), ig_high=(0.3, 0.5)), 0, OWN)
    pairs = {(c.values["ig.low"], c.values["ig.high"]) for c in found[1:]}
    assert pairs == {(0.0, 0.3), (0.3, 0.3), (0.0, 0.5), (0.3, 0.5)}


def test_an_end_that_is_not_searched_counts_too():
    found = candidates(grid(cfg_low=(0.5, 0.7, 0.8)), 0, OWN)
    assert [c.values["cfg.low"] for c in found] == [0.0, 0.5, 0.7]


def test_intervals_of_a_guidance_that_is_off_are_one_setting():
    found = candidates(grid(ig_scale=(1.0, 2.0), ig_low=(0.2, 0.4), ig_high=(0.1, 0.5)), 0, OWN)
    off = [c.values for c in found if c.values["ig.scale"] == 1]
    assert off == [{"ig.scale": 1.0, "ig.low": 0.0, "ig.high": 1.0}]
    assert len([c for c in found if c.values["ig.scale"] == 2]) == 2


RANDOM = {"ig.scale": (1.0, 3.0), "ig.low": (0.0, 0.8), "ig.high": (0.2, 1.0)}
RANDOM |= {"sampler.num_steps": (20.0, 50.0)}


def test_random_points_fill_the_ranges_and_are_as_many_as_asked_for():
    found = candidates(Space(RANDOM, "random", 200), 3, OWN)
    assert len(set(found)) == len(found) == 201
    assert found[0] == Candidate.of({name: OWN[name] for name in RANDOM})
    drawn = {name: np.array([c.values[name] for c in found[1:]]) for name in RANDOM}
    assert (drawn["ig.low"] <= drawn["ig.high"]).all()
    for name, values in drawn.items():
        low, high = RANDOM[name]
        assert low <= values.min() and values.max() <= high
        assert np.ptp(values) > 0.9 * (high - low)
    assert abs(drawn["ig.scale"].mean() - 2) < 4 * 2 / math.sqrt(12 * 200)
    assert (drawn["sampler.num_steps"] % 1 == 0).all()


def test_random_points_depend_on_the_seed_and_not_on_the_order_of_the_fields():
    first = candidates(Space(RANDOM, "random", 20), 3, OWN)
    backwards = dict(reversed(RANDOM.items()))
    assert candidates(Space(backwards, "random", 20), 3, OWN) == first
    assert not set(candidates(Space(RANDOM, "random", 20), 4, OWN)[1:]) & set(first[1:])


def test_rounding_takes_no_random_point_out_of_its_range():
    low, high = 1.23456, 1.23461
    found = candidates(Space({"ig.scale": (low, high)}, "random", 2), 0, OWN)
    assert all(low <= c.values["ig.scale"] <= high for c in found[1:])


def test_a_random_space_with_few_possible_points_ends():
    found = candidates(Space({"sampler.num_steps": (10.0, 12.0)}, "random", 50), 0, OWN)
    assert {c.values["sampler.num_steps"] for c in found} == {50, 10, 11, 12}


def test_a_setting_is_written_and_hashed_the_same_in_every_order():
    one, other = Candidate.of({"b": 1.5, "a": 20.0}), Candidate.of({"a": 20, "b": 1.5})
    assert one == other and hash(one) == hash(other)
    assert str(one) == "a=20 b=1.5"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (grid(ig_scale=(1.4,)), r"no possible setting besides the config's own \(ig\.scale=1\.4\)"),
        (grid(ig_scal=(1.4, 2.0)), r"sample\.ig\.scal is no number; known: ig\.scale, ig\.low"),
    ],
)
def test_a_space_with_nothing_to_compare_is_refused(space, message):
    with pytest.raises(UserError, match=message):
        candidates(space, 0, OWN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Space({"a": (1.0,)}, "sobol", 1), "method = 'sobol': must be grid or random"),
        (lambda: Space({"a": (1.0,)}, "random", 0), "candidates = 0: must be at least 1"),
        (lambda: Space({}, "grid", 0), "values = {}: needs at least one field"),
        (lambda: Space({"a": ()}, "grid", 0), r"values\.a = \(\): needs finite numbers"),
        (lambda: Space({"a": (math.nan,)}, "grid", 0), r"values\.a = \(nan,\): needs finite"),
        (lambda: Halving("fd", "less", 1, 0.5, 0), "better = 'less': must be lower or higher"),
        (lambda: Halving("fd", "lower", 0, 0.5, 0), "rounds = 0: must be at least 1"),
        (lambda: Halving("fd", "lower", 1, 0.0, 0), r"keep = 0\.0: must lie in \(0, 1\]"),
        (lambda: Halving("fd", "lower", 1, 1.1, 0), r"keep = 1\.1: must lie in \(0, 1\]"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


MEASURES = {"accuracy": ("label accuracy %", 1, 100.0), "fd": ("FD", 2, 1.0)}


def row(scale, mean, error, difference, seeds, default=False):
    return {
        "candidate": {"cfg.scale": 1.0, "ig.scale": scale},
        "default": default,
        "seeds": seeds,
        "fd": {"mean": mean, "std": 1.0, "error": error},
        "accuracy": {"mean": 0.5, "std": 0.1, "error": 0.05},
        "minus_default": difference,
    }


def test_the_table_shows_uncertainty_and_the_configs_own_row_wherever_it_stands():
    rows = [
        row(1.5, 2.314, 0.051, {"mean": -0.4, "std": 0.2, "error": 0.1}, 4),
        row(1.7, 2.5, 0.2, {"mean": 0.3, "std": 0.2, "error": 0.1}, 4),
        row(1.4, 3.0, 0.2, {"mean": 0.0, "std": 0.0, "error": 0.0}, 4, default=True),
        row(1.9, 9.0, None, {"mean": 6.0, "std": None, "error": None}, 1),
    ]
    lines = search_report.search_table(rows, MEASURES, "fd", best=1).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = ["rank", "cfg.scale", "ig.scale", "seeds", "FD", "minus config", "label accuracy %"]
    assert cells[0] == heads
    assert cells[2] == ["1", "1", "1.5", "4", "2.31 ± 0.05", "-0.40 ± 0.10", "50.0 ± 5.0"]
    assert cells[3] == ["3 (config)", "1", "1.4", "4", "3.00 ± 0.20", "", "50.0 ± 5.0"]
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "| 9.00 " in search_report.search_table(rows, MEASURES, "fd", best=4).splitlines()[-1]


def test_the_fields_drawn_are_those_with_the_most_values_and_scales_before_others():
    space = grid(ig_low=(0.1, 0.2, 0.3), ig_scale=(1.2, 1.3, 1.5), cfg_scale=(1.5, 2.0))
    rows = [{"candidate": c.values} for c in candidates(space, 0, OWN)]
    assert search_report.informative_fields(rows) == ["ig.scale", "ig.low"]
    rows = [{"candidate": c.values} for c in candidates(Space(RANDOM, "random", 30), 0, OWN)]
    assert search_report.informative_fields(rows)[0] == "ig.scale"
    rows = [{"candidate": c.values} for c in candidates(grid(ig_low=(0.1,)), 0, OWN)]
    assert search_report.informative_fields(rows) == ["ig.low"]


LINE = {"ig.scale": (1.2, 1.6, 2.0, 2.4), "cfg.scale": (1.35,)}
SCATTER = {"ig.scale": (1.0, 3.0), "cfg.scale": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("values", "method"),
    [
        (SMALL.values, "grid"),
        *(
            pytest.param(values, method, marks=pytest.mark.slow)
            for values, method in ((SCATTER, "random"), (LINE, "grid"), (LINE, "random"))
        ),
    ],
)
@pytest.mark.parametrize("better", slow_but(["lower"], ["lower", "higher"]))
def test_a_picture_is_drawn_of_every_kind_of_space(tmp_path, values, method, better):
    metric = {"lower": "fd", "higher": "accuracy"}[better]
    halving = Halving(metric, better, 3, 0.5, 0)
    search = searched(tmp_path / "search.json", Bowl(), halving, Space(values, method, 20))
    search_report.heat_map(tmp_path / "search.png", search.rows(), metric, better, method)
    with Image.open(tmp_path / "search.png") as picture:
        assert picture.size == (960, 660)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_cell_shows_the_best_over_the_fields_not_drawn_and_its_seeds():
    from matplotlib.figure import Figure

    def cell(x, y, other, mean, seeds, default=False):
        values = {"cfg.scale": x, "ig.scale": y, "ig.low": other}
        stats = {"mean": mean, "std": None, "error": None}
        return {"candidate": values, "fd": stats, "seeds": seeds, "default": default}

    rows = [
        cell(1.0, 2.0, 0.1, 3.0, 2),
        cell(1.0, 2.0, 0.2, 4.0, 2, default=True),
        cell(1.5, 2.0, 0.1, 9.0, 1),
        cell(1.0, 3.0, 0.2, math.inf, 1),
    ]
    axes = Figure().subplots()
    search_report._grid(axes, rows, "fd", ["cfg.scale", "ig.scale"], "lower")
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "3\n2×", (1, 0): "9\n1×", (0, 1): "inf\n1×"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "1.5"]
    picture = axes.images[0].get_array()
    assert picture[0, 1].min() > 0.5  # pale: one seed, though it is the worst, hence darkest
    assert tuple(picture[1, 1]) == search_report.EMPTY


@pytest.mark.parametrize("method", slow_but(["grid"], ["grid", "random"]))
@pytest.mark.parametrize("bad", slow_but([math.nan], [math.nan, math.inf]))
def test_a_picture_survives_measures_that_are_not_finite(tmp_path, bad, method):
    space = Space({"ig.scale": (1.2, 2.0, 3.0), "cfg.scale": (1.1, 1.5)}, method, 9)

    def measure(candidate, seed):
        return {"fd": bad if candidate.values["ig.scale"] > 2 else float(seed)}

    rows = searched(tmp_path / "search.json", measure, space=space).rows()
    search_report.heat_map(tmp_path / "search.png", rows, "fd", "lower", method)
    assert (tmp_path / "search.png").stat().st_size > 1000
