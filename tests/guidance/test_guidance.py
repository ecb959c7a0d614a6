"""Guidance against its formulas, and its cost against a record of what the networks were asked.

The networks here are made up: their answers depend on the label alone and are small whole numbers.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guided import FIXED, OFF, random_case
from tiers import slow_but
from vectors import quick_jit

from ig_jax import guidance
from ig_jax.diffusion.ddpm import DDPM
from ig_jax.diffusion.flow import Flow
from ig_jax.guidance import KINDS, Evaluations, Guidance, Guided, GuideModel
from ig_jax.samplers import base
from ig_jax.types import NetOutput

FLOW = Flow(path="linear", time_distribution="uniform")
NULL, READOUT = 9, 2
# Label -> (final, early) prediction of the made-up network, and the final one of a worse network.
ANSWERS = {0: (3.0, 1.0), 1: (5.0, -2.0), NULL: (2.0, 4.0)}
WORSE_ANSWERS = {0: (-1.0, 1e3), 1: (7.0, 1e3), NULL: (1e3, 1e3)}

every_sampler = pytest.mark.parametrize("name", FIXED)


def answering(answers):
    """A network that answers by label alone; depth 1 holds nonsense that nobody should read."""

    def net(params, x, t, y, *, taps=()):
        table = np.zeros((NULL + 1, 2), np.float32)
        table[list(answers)] = list(answers.values())
        final, early = (
            jnp.broadcast_to(params["gain"] * jnp.asarray(table)[y, i, None, None, None], x.shape)
            for i in (0, 1)
        )
        return NetOutput(pred=final, heads={1: early + 1e3, READOUT: early}, features={})

    return net


net, worse_net = answering(ANSWERS), answering(WORSE_ANSWERS)
PARAMS = {"gain": jnp.float32(1.0)}
LABELS = jnp.array([0, 1])
X = jnp.zeros((2, 1, 1, 1))
T = jnp.float32(0.5)


ALL_CHANNELS = dict.fromkeys(KINDS, 0)


def guided(
    net=net, worse=worse_net, y=LABELS, process=FLOW, channels=ALL_CHANNELS, **scales
) -> Guided:
    return Guided(
        net=net,
        params=PARAMS,
        process=process,
        y=y,
        null_class=NULL,
        scales=scales,
        channels=channels,
        readout=READOUT,
        guide=GuideModel(worse, FLOW, PARAMS),
    )


def velocities(**scales) -> list[float]:
    """Velocities of labels 0 and 1, guided by every kind that has a scale."""
    return guided(**scales).velocity(frozenset(scales), X, T).ravel().tolist()


def test_without_guidance_the_velocity_is_the_final_prediction():
    assert velocities() == [3.0, 5.0]


@pytest.mark.parametrize("scale, expected", [(1, [3, 5]), (0, [1, -2]), (2, [5, 12])])
def test_internal_guidance_goes_from_the_readout_through_the_final_prediction(scale, expected):
    assert velocities(ig=float(scale)) == expected


@pytest.mark.parametrize("scale, expected", [(1, [3, 5]), (0, [2, 2]), (3, [5, 11])])
def test_classifier_free_guidance_goes_from_null_through_conditional(scale, expected):
    assert velocities(cfg=float(scale)) == expected


@pytest.mark.parametrize("scale, expected", [(1, [3, 5]), (0, [-1, 7]), (2, [7, 3])])
def test_autoguidance_goes_from_the_worse_network_through_the_velocity(scale, expected):
    assert velocities(autoguidance=float(scale)) == expected


def test_internal_guidance_acts_on_both_branches_before_classifier_free_guidance():
    # Scale 2 inside: null 2 - 2 = 0, conditional 5 and 12; then three times that.
    assert velocities(ig=2.0, cfg=3.0) == [15.0, 36.0]


def test_autoguidance_comes_last_and_extrapolates_the_guided_velocity():
    # From -1 through 15, and from 7 through 36, twice as far.
    assert velocities(ig=2.0, cfg=3.0, autoguidance=2.0) == [31.0, 65.0]


def test_extrapolation_is_a_line_through_the_worse_and_the_better():
    worse, v = jnp.full((1, 1, 1, 2), 2.0), jnp.full((1, 1, 1, 2), 5.0)
    for scale, expected in ((0.0, 2), (1.0, 5), (3.0, 11)):
        assert guidance.extrapolate(worse, v, scale).ravel().tolist() == [expected] * 2


@pytest.mark.parametrize("scale", [0.0, 1.5, 7.0])
def test_classifier_free_guidance_changes_nothing_where_both_branches_agree(scale):
    null = guided(y=jnp.array([NULL, NULL]), cfg=scale)
    assert null.velocity(frozenset({"cfg"}), X, T).ravel().tolist() == [2.0, 2.0]


def by_channel(channels, **scales) -> list[list[float]]:
    """Velocities [label][channel] of latents with three channels."""
    x = jnp.zeros((2, 1, 1, 3))
    v = guided(channels=channels, **scales).velocity(frozenset(scales), x, T)
    return v.reshape(2, 3).tolist()


def test_outside_its_channels_a_guidance_leaves_the_velocity_as_it_is():
    assert by_channel({"ig": 2}, ig=2.0) == [[5, 5, 3], [12, 12, 5]]
    assert by_channel({"autoguidance": 1}, autoguidance=2.0) == [[7, 3, 3], [3, 5, 5]]


def test_outside_its_channels_classifier_free_guidance_leaves_the_conditional_velocity():
    assert by_channel({"cfg": 1}, cfg=3.0) == [[5, 3, 3], [11, 5, 5]]


def test_every_guidance_has_channels_of_its_own_and_0_is_all():
    # Channel 0: both, 1: CFG alone, 2: neither; with 0 channels, IG everywhere.
    both = {"ig": 2.0, "cfg": 3.0}
    assert by_channel({"ig": 1, "cfg": 2}, **both) == [[15, 5, 3], [36, 11, 5]]
    assert by_channel({"ig": 0, "cfg": 2}, **both) == [[15, 15, 5], [36, 36, 12]]


@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_guiding_predictions_of_another_kind_is_guiding_their_velocities(prediction):
    """Whatever the networks predict, each is read by its own process; the worse one's is FLOW."""
    flow = Flow("cosine", "uniform", prediction=prediction)
    x = jnp.full_like(X, 0.5)

    def velocity(y) -> np.ndarray:
        out, times = net(PARAMS, x, T, jnp.array(y)), jnp.full((2,), T)
        final, early = (flow.velocity(v, x, times) for v in (out.pred, out.heads[READOUT]))
        return np.asarray(early + 2.0 * (final - early))

    cond, null, worse = velocity([0, 1]), velocity([NULL, NULL]), np.array([-1.0, 7.0])
    with_cfg = (null + 3.0 * (cond - null)).ravel()
    scales = {"ig": 2.0, "cfg": 3.0, "autoguidance": 4.0}
    found = guided(process=flow, **scales).velocity(frozenset(KINDS), x, T)
    np.testing.assert_allclose(found.ravel(), worse + 4.0 * (with_cfg - worse), rtol=1e-4)


def test_the_score_of_a_field_is_that_of_the_process():
    t, v = jnp.float32(0.25), jnp.ones_like(X)
    field = guided().field(frozenset(), frozenset())
    np.testing.assert_array_equal(field.score(v, X, t), FLOW.score(v, X, t))


def test_the_time_of_a_ratio_of_a_field_is_that_of_the_process():
    field = guided().field(frozenset(), frozenset())
    assert field.time_of_ratio(jnp.float32(3.0)) == pytest.approx(0.75)


def test_a_field_has_a_velocity_of_its_own_at_the_end_of_a_step_only_where_guidance_differs():
    ig, none = frozenset({"ig"}), frozenset()
    assert guided(ig=2.0).field(ig, ig).velocity_at_end is None
    field = guided(ig=2.0).field(none, ig)
    assert field.velocity(X, T).ravel().tolist() == [3, 5]
    assert field.velocity_at_end(X, T).ravel().tolist() == [5, 12]


class Spy:
    """A network that notes what it is asked."""

    def __init__(self, net):
        self.net, self.asked = net, []

    def __call__(self, params, x, t, y, *, taps=()):
        self.asked.append((x, t, y))
        return self.net(params, x, t, y)


@pytest.mark.parametrize("scales, labels", [({}, [0, 1]), ({"cfg": 2.0}, [0, 1, NULL, NULL])])
def test_the_network_gets_each_latent_its_label_and_the_time_in_float32(scales, labels):
    spy, x = Spy(net), jnp.array([7.0, 8.0])[:, None, None, None]
    guided(spy, **scales).velocity(frozenset(scales), x, jnp.float32(0.25))
    [(x, t, y)] = spy.asked
    assert y.tolist() == labels
    assert x.ravel().tolist() == [7.0, 8.0] * (len(labels) // 2)
    assert t.tolist() == [0.25] * len(labels) and t.dtype == jnp.float32


@pytest.mark.parametrize("others", [{}, {"ig": 2.0, "cfg": 3.0}])
def test_the_worse_network_is_asked_once_for_the_labels_without_the_null_class(others):
    spy, x = Spy(worse_net), jnp.array([7.0, 8.0])[:, None, None, None]
    scales = {**others, "autoguidance": 2.0}
    guided(worse=spy, **scales).velocity(frozenset(scales), x, jnp.float32(0.25))
    [(x, t, y)] = spy.asked
    assert (x.ravel().tolist(), t.tolist(), y.tolist()) == ([7.0, 8.0], [0.25] * 2, [0, 1])
    assert t.dtype == jnp.float32


@pytest.mark.parametrize(("own", "others"), [(FLOW, DDPM()), (DDPM(), FLOW)])
def test_the_worse_network_is_told_the_time_in_its_own_terms_and_read_so(own, others):
    """One process counts steps and predicts noise, the other takes times and velocities as is."""
    x, t = jnp.array([0.5, -2.0])[:, None, None, None], jnp.float32(0.25)
    times = jnp.full((2,), t)
    spy = Spy(worse_net)
    both = guided(process=own, autoguidance=0.0)  # the worse velocity alone
    both = replace(both, guide=GuideModel(spy, others, PARAMS))
    found = both.velocity(frozenset({"autoguidance"}), x, t)
    [(_, asked, _)] = spy.asked
    assert own.condition_time(times)[0] != others.condition_time(times)[0]
    np.testing.assert_array_equal(asked, others.condition_time(times))
    answer = jnp.array([-1.0, 7.0])[:, None, None, None]
    np.testing.assert_allclose(found, others.velocity(answer, x, times), rtol=1e-5)
    assert not np.allclose(found, own.velocity(answer, x, times), rtol=1e-2)


def test_the_worse_network_is_not_asked_while_autoguidance_is_off():
    spy = Spy(worse_net)
    guided(worse=spy, autoguidance=2.0, ig=2.0).velocity(frozenset({"ig"}), X, T)
    assert spy.asked == []


def recorded_trajectory(sampler, **given: Guidance):
    """Runs the compiled trajectory.

    Returns:
      (time, rows) of every evaluation of the network, the same of the worse one, cut, and samples.
    """
    grid = sampler.grid()
    cut = guidance.segments(grid, given, at_end=sampler.guided_at_end)
    calls, worse_calls = [], []

    def spying(net, calls):
        def spy(params, x, t, y, *, taps=()):
            rows = len(y)
            jax.debug.callback(lambda t: calls.append((float(t), rows)), t[0])
            return net(params, x, t, y)

        return spy

    def trajectory(x):
        scales = {kind: g.scale for kind, g in given.items()}
        spies = guided(spying(net, calls), spying(worse_net, worse_calls), **scales)
        return base.sample(sampler, grid, spies.fields(cut), x, lambda i: jnp.zeros_like(x))

    end = quick_jit(trajectory)(X)
    jax.effects_barrier()
    return sorted(calls, reverse=True), sorted(worse_calls, reverse=True), cut, end


@pytest.mark.parametrize("seed", slow_but(range(4), range(12)))
def test_the_stated_number_of_evaluations_is_what_the_networks_were_asked(seed):
    sampler, given = random_case(seed)
    *calls, cut, _ = recorded_trajectory(sampler, **given)
    asked = [sum(rows for _, rows in each) / len(LABELS) for each in calls]
    assert guidance.evaluations(cut, sampler.calls()) == Evaluations(*asked)


@pytest.mark.parametrize("name", ["euler", "euler_maruyama", "dpmpp_2m", "adams_bashforth"])
def test_the_null_class_is_evaluated_inside_its_interval_alone(name):
    sampler, cfg = FIXED[name](8), Guidance(1.5, low=0.3, high=0.7)
    calls, _, _, _ = recorded_trajectory(sampler, ig=Guidance(2.0, 0.0, 1.0), cfg=cfg)
    times, rows = np.array(calls).T
    np.testing.assert_allclose(times, sampler.grid()[:-1], rtol=1e-6)
    np.testing.assert_array_equal(rows == 2 * len(LABELS), (times >= 0.3) & (times <= 0.7))
    assert np.all(rows[(times < 0.3) | (times > 0.7)] == len(LABELS))


def test_the_worse_network_is_evaluated_inside_its_interval_alone():
    given = {"autoguidance": Guidance(1.5, low=0.3, high=0.8), "cfg": Guidance(2.0, 0.0, 1.0)}
    _, calls, _, _ = recorded_trajectory(FIXED["euler"](4), **given)
    assert calls == [(0.75, 2), (0.5, 2)]


def test_both_evaluations_of_a_step_of_heun_are_guided_as_at_its_first_time():
    calls, _, _, _ = recorded_trajectory(FIXED["heun"](4), cfg=Guidance(1.5, low=0.6, high=0.8))
    assert calls == [(1, 2), (0.75, 4), (0.75, 2), (0.5, 4), (0.5, 2), (0.25, 2), (0.25, 2)]


def test_the_second_evaluation_of_a_step_of_heun2_is_guided_as_at_its_own_time():
    cfg, other = Guidance(1.5, low=0.6, high=0.8), Guidance(1.5, low=0.0, high=0.1)
    calls, worse, _, _ = recorded_trajectory(FIXED["heun2"](4), cfg=cfg, autoguidance=other)
    assert calls == [
        *((1, 2), (0.75, 4), (0.75, 4), (0.5, 2), (0.5, 2), (0.25, 2), (0.25, 2), (0, 2))
    ]
    assert worse == [(0, 2)]  # the corrector of the last step


def test_guiding_half_of_the_grid_costs_three_quarters_of_guiding_all_of_it():
    def rows(high: float) -> int:
        calls, _, _, _ = recorded_trajectory(FIXED["euler"](8), cfg=Guidance(1.5, 0.0, high))
        return sum(rows for _, rows in calls)

    assert rows(0.5) / rows(1.0) == 0.75


@every_sampler
def test_internal_guidance_costs_no_evaluation(name):
    plain, _, _, _ = recorded_trajectory(FIXED[name](4), ig=OFF)
    with_ig, _, _, _ = recorded_trajectory(FIXED[name](4), ig=Guidance(2.0, 0.0, 1.0))
    assert plain == with_ig


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "adams_bashforth"])
def test_each_step_moves_by_its_own_guided_velocity(name):
    """IG on steps 0 and 1, CFG on 1 and 2, autoguidance on 3: the sum of four steps of 1/4."""
    ig, cfg = Guidance(2.0, low=0.75, high=1.0), Guidance(3.0, low=0.5, high=0.75)
    given = {"ig": ig, "cfg": cfg, "autoguidance": Guidance(2.0, low=0.0, high=0.25)}
    _, _, _, end = recorded_trajectory(FIXED[name](4), **given)
    by_step = np.array([[5, 12], [15, 36], [5, 11], [7, 3]])
    np.testing.assert_allclose(end.ravel(), -by_step.sum(axis=0) / 4, rtol=1e-6)


def test_each_step_of_heun2_moves_by_the_mean_of_its_two_guided_velocities():
    """IG at times 1 and 3/4 alone: steps of 1/4 with both, one, and none of their slopes guided."""
    _, _, _, end = recorded_trajectory(FIXED["heun2"](4), ig=Guidance(2.0, low=0.75, high=1.0))
    by_step = np.array([[5, 12], [(5 + 3) / 2, (12 + 5) / 2], [3, 5], [3, 5]])
    np.testing.assert_allclose(end.ravel(), -by_step.sum(axis=0) / 4, rtol=1e-6)
