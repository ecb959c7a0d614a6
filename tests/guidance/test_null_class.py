"""CFG whose null class is asked seldom, or by the first blocks alone, against a loop in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from guided import FIXED
from vectors import quick_jit

from ig_jax import guidance
from ig_jax.config.parser import ConfigError
from ig_jax.diffusion.flow import Flow
from ig_jax.errors import UserError
from ig_jax.generation.cost import cost
from ig_jax.generation.plan import plan
from ig_jax.guidance import Evaluations, Guidance, Guided, NullClass
from ig_jax.monitoring import flops
from ig_jax.programs import evaluate, run_record
from ig_jax.samplers import base
from ig_jax.types import Field, NetOutput

FLOW = Flow(path="linear", time_distribution="uniform")
NULL, READOUT = 3, 2
LABELS = jnp.array([2, 0, 1])
START = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 1)), jnp.float32)
# Of x, of t and alone, by label; the last row is the null class's.
FINAL = np.array([[0.3, -1.1, 0.2], [-0.4, 0.7, 1.3], [0.9, 0.1, -0.6], [-0.2, 1.7, 0.5]])
EARLY = np.array([[0.1, 2.0, 0.4], [0.5, -0.3, 0.8], [-0.7, 0.6, 0.0], [1.1, -0.9, 0.3]])
CFG, IG = 2.5, 1.6


def answer(table, x, t, y):
    of_x, of_t, alone = (jnp.asarray(table, jnp.float32)[y, i, None, None, None] for i in range(3))
    return of_x * x + of_t * jnp.reshape(t, (-1, 1, 1, 1)) + alone


class Net:
    """Linear in x and t; keeps the rows it was asked for, whole and up to the readout."""

    def __init__(self):
        self.whole, self.early_rows = [], []

    def __call__(self, params, x, t, y, *, taps=()):
        rows = len(y)
        jax.debug.callback(lambda: self.whole.append(rows))
        return NetOutput(answer(FINAL, x, t, y), {READOUT: answer(EARLY, x, t, y)}, {})

    def early(self, params, x, t, y, depth):
        assert depth == READOUT
        rows = len(y)
        jax.debug.callback(lambda: self.early_rows.append(rows))
        return answer(EARLY, x, t, y)


def noise(i):
    return jnp.sin(START * (1 + i))


def compiled(sampler, given: dict[str, Guidance], null: NullClass):
    """(end, whole passes a sample, passes to the readout a sample, cut)."""
    net = Net()
    cut = guidance.segments(sampler.grid(), given, at_end=sampler.guided_at_end)

    def draw(x):
        scales = {kind: g.scale for kind, g in given.items()}
        guided = Guided(net, {}, FLOW, LABELS, NULL, scales, {}, READOUT, null=null)
        return base.sample(sampler, sampler.grid(), guided.fields(cut), x, noise)

    end = quick_jit(draw)(START)
    jax.effects_barrier()
    rows = len(LABELS)
    return end, sum(net.whole) // rows, sum(net.early_rows) // rows, cut


def looped(sampler, given: dict[str, Guidance], null: NullClass):
    """The same, step by step, in the words of the option."""
    grid, x = sampler.grid(), START
    cut = guidance.segments(grid, given, at_end=sampler.guided_at_end)
    nulls = jnp.full_like(LABELS, NULL)

    def branch(on, x, t, y):
        v = answer(FINAL, x, t, y)
        early = answer(EARLY, x, t, y)
        return early + IG * (v - early) if "ig" in on else v

    for segment in cut:
        difference, past = None, sampler.nothing(x) if sampler.multistep else None
        for i in range(segment.start, segment.stop):
            asks = (i - segment.start) % null.every_steps == 0

            def velocity(x, t, on=segment.on):
                nonlocal difference, asks
                found = branch(on, x, t, LABELS)
                if "cfg" not in on:
                    return found
                if asks or null.every_steps == 1:
                    if null.readout:
                        difference = found - answer(EARLY, x, t, nulls)
                    else:
                        difference = found - branch(on, x, t, nulls)
                    asks = False
                return found + (CFG - 1) * difference

            def at_end(x, t, on=segment.on_at_end, velocity=velocity):
                return velocity(x, t, on)

            field = Field(velocity, FLOW.score, at_end, coefficients=FLOW.coefficients)
            t, t_next = (jnp.float32(grid[j]) for j in (i, i + 1))
            last = i == len(grid) - 2
            if sampler.multistep and last:
                x = sampler.last_step(field, x, t, t_next, past)
            elif sampler.multistep:
                x, past = sampler.step(field, x, t, t_next, past)
            elif last:
                x = sampler.last_step(field, x, t, t_next)
            else:
                x = sampler.step(field, x, t, t_next, noise(i))
    return x


@pytest.mark.parametrize(
    ("name", "null"),
    [
        ("euler", NullClass(2)),
        ("euler_maruyama", NullClass(50)),
        ("heun", NullClass(3)),
        ("heun2", NullClass(2, READOUT)),
        ("adams_bashforth", NullClass(2)),
        ("dpmpp_2m", NullClass(1, READOUT)),
    ],
    ids=str,
)
def test_samples_and_their_cost_are_those_of_a_loop_in_python(name, null):
    """IG and CFG switch on and off on the way, and not at the same steps."""
    given = {"ig": Guidance(IG, 0.3, 1.0), "cfg": Guidance(CFG, 0.15, 0.8)}
    sampler = FIXED[name](9)
    end, whole, early, cut = compiled(sampler, given, null)
    np.testing.assert_allclose(end, looped(sampler, given, null), rtol=2e-5, atol=2e-5)
    expected = Evaluations(whole, 0, early)
    assert guidance.evaluations(cut, sampler.calls(), null) == expected


def test_a_difference_goes_on_until_the_next_is_asked_for():
    """Euler's steps of 1/4 under CFG: one is asked in steps 0 and 2, by (class, both) rows."""
    given = {"cfg": Guidance(CFG, 0.0, 1.0)}
    ends = [compiled(FIXED["euler"](4), given, NullClass(k)) for k in (1, 2, 4)]
    assert [(whole, early) for _, whole, early, _ in ends] == [(8, 0), (6, 0), (5, 0)]
    distances = [np.abs(end - ends[0][0]).max() for end, *_ in ends[1:]]
    assert 1e-3 < distances[0] < distances[1]


def test_where_the_difference_is_constant_asking_seldom_changes_nothing():
    def constant(params, x, t, y, *, taps=()):
        common = jnp.sin(3 * x) + t[:, None, None, None]
        return NetOutput(
            common + jnp.asarray([1.0, -2.0, 0.5, 0.7])[y][:, None, None, None], {}, {}
        )

    sampler, given = FIXED["heun"](7), {"cfg": Guidance(CFG, 0.0, 1.0)}
    cut = guidance.segments(sampler.grid(), given)

    def end(null):
        guided = Guided(constant, {}, FLOW, LABELS, NULL, {"cfg": CFG}, {}, null=null)
        walk = quick_jit(
            lambda x: base.sample(sampler, sampler.grid(), guided.fields(cut), x, noise)
        )
        return walk(START)

    np.testing.assert_allclose(end(NullClass(3)), end(NullClass(1)), rtol=1e-5, atol=1e-6)


def test_only_the_guided_channels_are_moved_by_a_kept_difference():
    x = jnp.tile(START, (1, 1, 1, 2))
    sampler, given = FIXED["euler"](4), {"cfg": Guidance(CFG, 0.0, 1.0)}
    cut = guidance.segments(sampler.grid(), given)

    @quick_jit
    def ends():
        def end(channels):
            alone = (Net(), {}, FLOW, LABELS, NULL, {"cfg": CFG}, {"cfg": channels})
            fields = Guided(*alone, null=NullClass(2)).fields(cut)
            return base.sample(sampler, sampler.grid(), fields, x, noise)

        return end(0), end(1)

    everywhere, first = ends()

    plain, _, _, _ = compiled(sampler, {"cfg": Guidance(1.0, 0.0, 1.0)}, NullClass(2))
    np.testing.assert_allclose(first[..., :1], everywhere[..., :1], rtol=1e-6)
    np.testing.assert_allclose(first[..., 1:], plain, rtol=1e-5, atol=1e-6)


def test_samplers_that_ask_for_noise_keep_its_difference():
    """The noise of `Flow`: alpha v - alpha' x on the linear path, an affine map of the velocity."""
    process = Flow("linear", "uniform", prediction="noise")
    guided = Guided(Net(), {}, process, LABELS, NULL, {"cfg": CFG}, {}, null=NullClass(2))
    field, t, later = guided.field(frozenset({"cfg"}), frozenset({"cfg"})), 0.7, 0.6
    first = field.of_step(jnp.int32(0), jnp.zeros_like(START))
    found, _ = first.noise_and_variance(START, jnp.float32(t))
    own, null = (answer(FINAL, START, t, y) for y in (LABELS, jnp.full_like(LABELS, NULL)))
    np.testing.assert_allclose(found, null + CFG * (own - null), rtol=1e-4, atol=1e-5)
    second = field.of_step(jnp.int32(1), first.left())
    found, _ = second.noise_and_variance(START, jnp.float32(later))
    kept = answer(FINAL, START, later, LABELS) + (CFG - 1) * (own - null)
    np.testing.assert_allclose(found, kept, rtol=1e-4, atol=1e-5)


def test_without_cfg_the_plan_is_that_of_every_evaluation():
    def planned(scale, null):
        return plan(FLOW, FIXED["euler"](4), {"cfg": Guidance(scale, 0, 1)}, null=null)

    assert planned(1.0, NullClass(2)) == planned(1.0, NullClass())
    assert planned(2.0, NullClass(2)) != planned(2.0, NullClass())


# Of a run.


def settings(every_steps=1, readout=None, **more):
    return {
        "sample.null_class": {"every_steps": every_steps, "readout": readout},
        "sample.cfg.scale": 2.0,
        "sample.sampler": {"name": "euler", "num_steps": 4},
        **more,
    }


def test_a_run_samples_by_its_settings_counts_them_and_records_them():
    usual, seldom, partial = (
        tiny.experiment(settings(*null))
        for null in ((), (2,), (1, tiny.experiment().net.settings.readouts[0]))
    )
    costs = [cost(exp.pipeline.generator()) for exp in (usual, seldom, partial)]
    passes = [(each["evaluations"], each["to_readout"]) for each in costs]
    assert passes == [(8, 0), (6, 0), (4, 4)]
    net = usual.net
    (depth,) = net.settings.readouts
    one = flops.to_readout(net, net.abstract_params, depth)
    assert costs[2]["flops"] - 4 * one == costs[0]["flops"] // 2
    records = [run_record.settings(exp, 1) for exp in (usual, seldom, partial)]
    assert ["null_class" in record for record in records] == [False, True, True]
    told = [
        evaluate._how(exp, 1, each)
        for exp, each in zip((usual, seldom, partial), costs, strict=True)
    ]
    assert "null class" not in told[0]
    assert "null class every 2 steps, 6 evaluations" in told[1]
    assert f"null class at every evaluation, by readout {depth}, 4 evaluations" in told[2]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"every_steps": 0}, "null_class.every_steps = 0: must be at least 1"),
        ({"readout": 7}, r"sample.null_class.readout = 7: must be one of model.readouts = "),
        (
            {"every_steps": 2, "sample.sampler": {"name": "dopri5", "num_steps": 50}},
            "sample.null_class.every_steps = 2: this sampler chooses its own steps",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, rule):
    with pytest.raises(ConfigError, match=rule):
        tiny.experiment(settings(**changes))


def test_a_sampler_named_in_a_call_is_held_to_the_steps_of_the_null_class():
    pipe = tiny.experiment(settings(2)).pipeline
    with pytest.raises(UserError, match="null_class.every_steps = 2: this sampler chooses"):
        pipe.sample([1], sampler="dopri5")
