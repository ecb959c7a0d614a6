"""Where each guidance is on: intervals, segments of a grid, pieces of an adaptive solver."""

from fractions import Fraction

import numpy as np
import pytest
from guided import FIXED, OFF, random_case, random_guidances

from ig_jax import guidance
from ig_jax.generation import plan
from ig_jax.guidance import KINDS, Guidance, Segment


@pytest.mark.parametrize(
    "t, on", [(0.2, True), (0.5, True), (0.7, True), (0.1, False), (1.0, False)]
)
def test_an_interval_holds_both_of_its_ends(t, on):
    assert Guidance(2.0, low=0.2, high=0.7).on(t) == on


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_scale_1_is_off_everywhere(t):
    assert not OFF.on(t)
    assert Guidance(0.0, low=0.0, high=1.0).on(t)  # only 1 is off


@pytest.mark.parametrize(
    "low, high", [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (np.nan, 0.5), (0.5, np.nan)]
)
def test_an_interval_that_is_none_is_refused_by_both_its_ends(low, high):
    with pytest.raises(ValueError, match=f"low = {low}, high = {high}: must satisfy 0 <= low"):
        Guidance(1.5, low=low, high=high)


def test_a_negative_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="channels = -1: must not be negative"):
        Guidance(1.5, 0.0, 1.0, channels=-1)


def test_only_turns_off_all_but_the_named_kinds():
    given = {kind: Guidance(2.0, 0.25, 0.75, channels=3) for kind in KINDS}
    found = guidance.only(given, ("cfg",))
    assert found["cfg"] == given["cfg"]
    for kind in ("ig", "autoguidance"):
        assert found[kind] == Guidance(1.0, 0.25, 0.75, channels=3)


def kinds(*names: str) -> frozenset[str]:
    return frozenset(names)


def even(start: int, stop: int, *names: str) -> Segment:
    """A segment that is guided alike at both ends of its steps."""
    return Segment(start, stop, kinds(*names), kinds(*names))


def test_stretches_are_cut_where_a_flag_flips_with_both_ends_inside():
    grid = np.linspace(1, 0, 9)  # multiples of 1/8, exact in binary
    given = {"ig": Guidance(2.0, low=0.25, high=0.75), "cfg": Guidance(1.5, low=0.5, high=1.0)}
    assert guidance.segments(grid, given) == (
        even(0, 2, "cfg"),  # 1, 7/8
        even(2, 5, "ig", "cfg"),  # 6/8, 5/8, 4/8
        even(5, 7, "ig"),  # 3/8, 2/8
        even(7, 8),  # 1/8; the grid's last time starts no step
    )


def test_a_sampler_that_asks_at_the_end_of_a_step_gets_a_stretch_for_the_step_across_a_flip():
    given = {"autoguidance": Guidance(2.0, low=0.25, high=0.75)}
    on, off = kinds("autoguidance"), kinds()
    assert guidance.segments(np.linspace(1, 0, 9), given, at_end=True) == (
        Segment(0, 1, off, off),  # 1 -> 7/8
        Segment(1, 2, off, on),  # 7/8 -> 6/8
        Segment(2, 6, on, on),  # 6/8 ... 2/8
        Segment(6, 7, on, off),  # 2/8 -> 1/8
        Segment(7, 8, off, off),  # 1/8 -> 0
    )


@pytest.mark.parametrize("at_end", [False, True])
def test_without_guidance_the_grid_is_one_stretch(at_end):
    given = dict.fromkeys(KINDS, OFF)
    assert guidance.segments(np.linspace(1, 0, 9), given, at_end=at_end) == (even(0, 8),)


# Time -> time, exactly and as `generation.plan` computes it: shifts, and a process that keeps away
# from the ends of [0, 1].
GRIDS = {
    "even": (lambda t: t, lambda grid: grid),
    "shift 3": (lambda t: 3 * t / (1 + 2 * t), lambda grid: plan.shift_times(grid, 3.0)),
    "shift 1 / 0.3": (
        lambda t: t / (t + Fraction(3, 10) * (1 - t)),
        lambda grid: plan.shift_times(grid, 1 / 0.3),
    ),
    "inside": (
        lambda t: Fraction(1, 1000) + Fraction(998, 1000) * t,
        lambda grid: 0.001 + (1 - 0.001 - 0.001) * plan.shift_times(grid, 1.0),
    ),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("num_steps", [10, 20, 50, 250])
def test_an_end_on_the_grid_is_inside_however_both_are_rounded(num_steps, name):
    """Every time of a decimal grid as a lower and as an upper end, against exact fractions."""
    exactly, computed = GRIDS[name]
    exact = [exactly(Fraction(num_steps - i, num_steps)) for i in range(num_steps + 1)]
    grid = computed(FIXED["euler"](num_steps).grid()).tolist()
    for i, end in enumerate(map(float, exact)):
        lower, upper = Guidance(2.0, end, 1.0), Guidance(2.0, 0.0, end)
        assert [lower.on(t) for t in grid] == [j <= i for j in range(num_steps + 1)], end
        assert [upper.on(t) for t in grid] == [j >= i for j in range(num_steps + 1)], end


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("num_steps", [10, 20, 50, 250])
@pytest.mark.parametrize("low", ["0.1", "0.2", "0.3", "0.4"])
@pytest.mark.parametrize("high", ["0.4", "0.6", "0.7", "0.9", "1"])
def test_stretches_of_a_decimal_grid_begin_and_end_at_the_very_steps(low, high, num_steps, at_end):
    def on(step: int) -> bool:
        return Fraction(low) <= Fraction(num_steps - step, num_steps) <= Fraction(high)

    cut = guidance.segments(
        FIXED["heun2"](num_steps).grid(),
        {"cfg": Guidance(2.0, float(low), float(high))},
        at_end=at_end,
    )
    assert [("cfg" in s.on, "cfg" in s.on_at_end) for s in cut for _ in range(s.start, s.stop)] == [
        (on(i), on(i + 1 if at_end else i)) for i in range(num_steps)
    ]


def test_a_time_beside_an_end_is_outside():
    given = Guidance(2.0, 0.3, 0.7)
    assert [given.on(t) for t in (0.3 - 2e-9, 0.3, 0.7, 0.7 + 2e-9)] == [False, True, True, False]
    assert Guidance(2.0, 0.3, 0.3).on(0.1 + 0.2)


def expected_on(given, times) -> list[frozenset[str]]:
    return [
        frozenset(k for k, g in given.items() if g.scale != 1 and g.low <= t <= g.high)
        for t in times.tolist()
    ]


def flags_of(steps: range, cut: tuple[Segment, ...]) -> list[tuple]:
    """(on, on_at_end) of each step; fails unless exactly one segment holds it."""
    owners = [[s for s in cut if s.start <= i < s.stop] for i in steps]
    assert [len(stretches) for stretches in owners] == [1] * len(steps)
    return [(s.on, s.on_at_end) for (s,) in owners]


@pytest.mark.parametrize("at_end", [False, True])
def test_every_step_lies_in_one_stretch_which_has_its_flags(at_end):
    for seed in range(200):
        sampler, given = random_case(seed)
        grid = sampler.grid()
        cut = guidance.segments(grid, given, at_end=at_end)
        first, last = expected_on(given, grid[:-1]), expected_on(given, grid[1:])
        expected = list(zip(first, last if at_end else first, strict=True))
        assert flags_of(range(len(grid) - 1), cut) == expected, seed


@pytest.mark.parametrize("at_end", [False, True])
def test_stretches_are_in_order_and_as_few_as_can_be(at_end):
    for seed in range(200):
        sampler, given = random_case(seed)
        cut = guidance.segments(sampler.grid(), given, at_end=at_end)
        for before, after in zip(cut[:-1], cut[1:], strict=True):
            assert before.stop == after.start, seed
            assert before[2:] != after[2:], seed


def test_pieces_are_cut_at_the_ends_of_the_intervals_that_are_on():
    given = {
        "ig": Guidance(2.0, low=0.25, high=1.0),
        "cfg": Guidance(1.5, low=0.0, high=0.7),
        "autoguidance": Guidance(1.0, low=0.4, high=0.6),  # off: no cut
    }
    grid, cut = guidance.adaptive_segments(1.0, 0.0, given)
    assert grid.tolist() == [1.0, 0.7, 0.25, 0.0] and grid.dtype == np.float64
    assert cut == (even(0, 1, "ig"), even(1, 2, "ig", "cfg"), even(2, 3, "cfg"))


@pytest.mark.parametrize("given", [{}, {"ig": OFF}, {"ig": Guidance(2.0, 1.0, 1.0)}])
def test_without_an_interval_inside_there_is_one_piece_without_guidance(given):
    grid, cut = guidance.adaptive_segments(1.0, 0.0, given)
    assert grid.tolist() == [1.0, 0.0] and cut == (even(0, 1),)


def test_an_interval_of_one_moment_guides_no_piece():
    grid, cut = guidance.adaptive_segments(1.0, 0.0, {"cfg": Guidance(2.0, 0.5, 0.5)})
    assert grid.tolist() == [1.0, 0.5, 0.0] and cut == (even(0, 1), even(1, 2))


def test_ends_that_differ_by_rounding_alone_make_one_cut():
    given = {"ig": Guidance(2.0, 0.3, 1.0), "cfg": Guidance(2.0, 0.0, 0.1 + 0.2)}
    assert given["ig"].low != given["cfg"].high
    grid, cut = guidance.adaptive_segments(1.0, 0.0, given)
    assert len(grid) == 3 and cut == (even(0, 1, "ig"), even(1, 2, "cfg"))
    almost_all = {"ig": Guidance(2.0, 1e-10, 1 - 1e-10)}
    assert guidance.adaptive_segments(1.0, 0.0, almost_all)[1] == (even(0, 1, "ig"),)


def test_pieces_stay_between_the_first_and_the_last_time():
    given = {"ig": Guidance(2.0, low=0.0005, high=0.9995)}
    grid, cut = guidance.adaptive_segments(0.999, 0.001, given)
    assert grid.tolist() == [0.999, 0.001] and cut == (even(0, 1, "ig"),)


def test_no_piece_holds_a_jump_of_guidance():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        given = random_guidances(rng, np.linspace(1, 0, 5))
        grid, cut = guidance.adaptive_segments(1.0, 0.0, given)
        assert (grid[0], grid[-1]) == (1, 0) and np.all(np.diff(grid) < 0)
        assert [(s.start, s.stop) for s in cut] == [(i, i + 1) for i in range(len(grid) - 1)]
        for high, low, s in zip(grid[:-1], grid[1:], cut, strict=True):
            inside = low + (high - low) * rng.uniform(0.001, 0.999, 20)
            assert {s.on, s.on_at_end} == set(expected_on(given, inside)), seed
