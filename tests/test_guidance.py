"""Guidance against its two formulas, and its cost against a record of what the network was asked.

The network here is made up: its answers depend on the label alone and are small whole numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax import guidance
from ig_jax.diffusion.flow import Flow
from ig_jax.guidance import Guidance, Stretch
from ig_jax.samplers import SAMPLERS, base
from ig_jax.types import NetOutput

FLOW = Flow(path="linear", time_distribution="uniform")
NULL, READOUT = 9, 2
OFF = Guidance(scale=1.0, low=0.0, high=1.0)
# Label -> (final, early) prediction of the made-up network.
ANSWERS = {0: (3.0, 1.0), 1: (5.0, -2.0), NULL: (2.0, 4.0)}

every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def net(params, x, t, y, *, taps=()):
    """Answers by label alone; depth 1 holds nonsense that nobody should read."""
    table = np.zeros((NULL + 1, 2), np.float32)
    table[list(ANSWERS)] = list(ANSWERS.values())
    final, early = (params["gain"] * jnp.asarray(table)[y, i].reshape(x.shape) for i in (0, 1))
    return NetOutput(pred=final, heads={1: early + 1e3, READOUT: early}, features={})


PARAMS = {"gain": jnp.float32(1.0)}
LABELS = jnp.array([0, 1])
X = jnp.zeros((2, 1, 1, 1))


def field(net=net, y=LABELS, ig_scale=None, cfg_scale=None):
    scales = {"ig_scale": ig_scale, "cfg_scale": cfg_scale}
    return guidance.field(net, PARAMS, y, process=FLOW, null_class=NULL, readout=READOUT, **scales)


def velocities(**scales) -> list[float]:
    """Guided velocities of labels 0 and 1."""
    return field(**scales).velocity(X, jnp.float32(0.5)).ravel().tolist()


def test_without_guidance_the_velocity_is_the_final_prediction():
    assert velocities() == [3.0, 5.0]


@pytest.mark.parametrize("scale, expected", [(1, [3, 5]), (0, [1, -2]), (2, [5, 12])])
def test_internal_guidance_goes_from_the_readout_through_the_final_prediction(scale, expected):
    assert velocities(ig_scale=float(scale)) == expected
    out = net(PARAMS, X, jnp.zeros(2), LABELS)
    assert guidance.internal(out, READOUT, float(scale)).ravel().tolist() == expected


@pytest.mark.parametrize("scale, expected", [(1, [3, 5]), (0, [2, 2]), (3, [5, 11])])
def test_classifier_free_guidance_goes_from_null_through_conditional(scale, expected):
    assert velocities(cfg_scale=float(scale)) == expected


def test_internal_guidance_acts_on_both_branches_before_classifier_free_guidance():
    # Scale 2 inside: null 2 - 2 = 0, conditional 5 and 12; then three times that.
    assert velocities(ig_scale=2.0, cfg_scale=3.0) == [15.0, 36.0]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5, 7.0])
def test_classifier_free_guidance_changes_nothing_where_both_branches_agree(cfg_scale):
    alike = field(y=jnp.array([NULL, NULL]), cfg_scale=cfg_scale).velocity(X, jnp.float32(0.5))
    assert alike.ravel().tolist() == [2.0, 2.0]


def test_the_score_of_a_field_is_that_of_the_process():
    t, v = jnp.float32(0.25), jnp.ones_like(X)
    np.testing.assert_array_equal(field().score(v, X, t), FLOW.score(v, X, t))


@pytest.mark.parametrize("cfg_scale, labels", [(None, [0, 1]), (2.0, [0, 1, NULL, NULL])])
def test_the_network_gets_each_latent_its_label_and_the_time_in_float32(cfg_scale, labels):
    asked = {}

    def spy(params, x, t, y, *, taps=()):
        asked.update(x=x, t=t, y=y)
        return net(params, x, t, y)

    x = jnp.array([7.0, 8.0])[:, None, None, None]
    field(spy, cfg_scale=cfg_scale).velocity(x, jnp.float32(0.25))
    assert asked["y"].tolist() == labels
    assert asked["x"].ravel().tolist() == [7.0, 8.0] * (len(labels) // 2)
    assert asked["t"].tolist() == [0.25] * len(labels) and asked["t"].dtype == jnp.float32


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


def test_stretches_are_cut_where_a_flag_flips_with_both_ends_inside():
    grid = np.linspace(1, 0, 9)  # multiples of 1/8, exact in binary
    ig, cfg = Guidance(2.0, low=0.25, high=0.75), Guidance(1.5, low=0.5, high=1.0)
    assert guidance.stretches(grid, ig, cfg) == [
        Stretch(0, 2, False, True),  # 1, 7/8
        Stretch(2, 5, True, True),  # 6/8, 5/8, 4/8
        Stretch(5, 7, True, False),  # 3/8, 2/8
        Stretch(7, 8, False, False),  # 1/8; the grid's last time starts no step
    ]


def test_without_guidance_the_grid_is_one_stretch():
    assert guidance.stretches(np.linspace(1, 0, 9), OFF, OFF) == [Stretch(0, 8, False, False)]


def random_case(seed: int):
    """A sampler of a random length and two guidances with random intervals, one often off."""
    rng = np.random.default_rng(seed)
    sampler = list(SAMPLERS.values())[seed % len(SAMPLERS)](int(rng.integers(2, 12)))
    # Half of the ends lie on the grid, where a comparison in the wrong precision would show.
    ends = np.where(rng.random(4) < 0.5, rng.random(4), rng.choice(sampler.grid(), 4))
    ig_scale, cfg_scale = rng.choice([1.0, 1.4, 3.0], 2).tolist()
    ig = Guidance(ig_scale, *sorted(ends[:2].tolist()))
    cfg = Guidance(cfg_scale, *sorted(ends[2:].tolist()))
    return sampler, ig, cfg


def flags_of(steps: range, cut: list[Stretch]) -> list[tuple[bool, bool]]:
    """(ig, cfg) of each step; fails unless exactly one stretch holds it."""
    owners = [[s for s in cut if s.start <= i < s.stop] for i in steps]
    assert [len(stretches) for stretches in owners] == [1] * len(steps)
    return [(s.ig, s.cfg) for (s,) in owners]


def test_every_step_lies_in_one_stretch_which_has_its_flags():
    for seed in range(200):
        sampler, ig, cfg = random_case(seed)
        starts = sampler.grid()[:-1].tolist()
        cut = guidance.stretches(sampler.grid(), ig, cfg)
        expected = [tuple(g.scale != 1 and g.low <= t <= g.high for g in (ig, cfg)) for t in starts]
        assert flags_of(range(len(starts)), cut) == expected, seed


def test_stretches_are_in_order_and_as_few_as_can_be():
    for seed in range(200):
        sampler, ig, cfg = random_case(seed)
        cut = guidance.stretches(sampler.grid(), ig, cfg)
        for before, after in zip(cut[:-1], cut[1:], strict=True):
            assert before.stop == after.start, seed
            assert (before.ig, before.cfg) != (after.ig, after.cfg), seed


def recorded_trajectory(sampler, ig: Guidance, cfg: Guidance):
    """Runs the compiled trajectory; returns (time, rows) of every evaluation, cut, and samples."""
    cut, calls = guidance.stretches(sampler.grid(), ig, cfg), []

    def spy(params, x, t, y, *, taps=()):
        rows = len(y)
        jax.debug.callback(lambda t: calls.append((float(t), rows)), t[0])
        return net(params, x, t, y)

    def trajectory(params, x):
        settings = {"process": FLOW, "null_class": NULL, "readout": READOUT, "ig": ig, "cfg": cfg}
        fields = guidance.fields(cut, spy, params, LABELS, **settings)
        return base.sample(sampler, fields, x, lambda i: jnp.zeros_like(x))

    end = jax.jit(trajectory)(PARAMS, X)
    jax.effects_barrier()
    return sorted(calls, reverse=True), cut, end


@pytest.mark.parametrize("seed", range(9))
def test_the_stated_number_of_evaluations_is_what_the_network_was_asked(seed):
    sampler, ig, cfg = random_case(seed)
    calls, cut, _ = recorded_trajectory(sampler, ig, cfg)
    asked = sum(rows for _, rows in calls) / len(LABELS)
    assert guidance.evaluations(cut, sampler.calls_per_step) == asked


@pytest.mark.parametrize("name", ["euler", "euler_maruyama"])
def test_the_null_class_is_evaluated_inside_its_interval_alone(name):
    sampler, cfg = SAMPLERS[name](8), Guidance(1.5, low=0.3, high=0.7)
    calls, _, _ = recorded_trajectory(sampler, Guidance(2.0, low=0.0, high=1.0), cfg)
    times, rows = np.array(calls).T
    np.testing.assert_allclose(times, sampler.grid()[:-1], rtol=1e-6)
    np.testing.assert_array_equal(rows == 2 * len(LABELS), (times >= 0.3) & (times <= 0.7))
    assert np.all(rows[(times < 0.3) | (times > 0.7)] == len(LABELS))


def test_both_evaluations_of_a_step_are_guided_as_at_its_first_time():
    calls, _, _ = recorded_trajectory(SAMPLERS["heun"](4), OFF, Guidance(1.5, low=0.6, high=0.8))
    assert calls == [(1, 2), (0.75, 4), (0.75, 2), (0.5, 4), (0.5, 2), (0.25, 2), (0.25, 2)]


def test_guiding_half_of_the_grid_costs_three_quarters_of_guiding_all_of_it():
    def rows(high: float) -> int:
        calls, _, _ = recorded_trajectory(SAMPLERS["euler"](8), OFF, Guidance(1.5, 0.0, high))
        return sum(rows for _, rows in calls)

    assert rows(0.5) / rows(1.0) == 0.75


@every_sampler
def test_internal_guidance_costs_no_evaluation(name):
    plain, _, _ = recorded_trajectory(SAMPLERS[name](4), OFF, OFF)
    guided, _, _ = recorded_trajectory(SAMPLERS[name](4), Guidance(2.0, 0.0, 1.0), OFF)
    assert plain == guided


def test_each_step_moves_by_its_own_guided_velocity():
    """IG on steps 0 and 1, CFG on 1 and 2, nothing on 3: the sum of four steps of 1/4."""
    ig, cfg = Guidance(2.0, low=0.75, high=1.0), Guidance(3.0, low=0.5, high=0.75)
    _, _, end = recorded_trajectory(SAMPLERS["euler"](4), ig, cfg)
    by_step = np.array([[5, 12], [15, 36], [5, 11], [3, 5]])
    np.testing.assert_allclose(end.ravel(), -by_step.sum(axis=0) / 4, rtol=1e-6)
