"""Settings of token groups and of what reads them; losses by the times of tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
import tiny

from ig_jax.config.parser import ConfigError
from ig_jax.diffusion.ddpm import DDPM, STEPS
from ig_jax.diffusion.flow import Flow
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import Objective
from ig_jax.objectives.metrics import TIME_BUCKETS
from ig_jax.objectives.self_alignment import SelfAlignment
from ig_jax.objectives.token_groups import GroupSettings, by_group, of_each_token, of_pixels

TWO = {"objective.groups.shares": (0.25, 0.75), "objective.groups.dual_time": True}
ALIGNED = {"weight": 0.5, "depth": 1, "teacher_depth": 2}


def objective(net, groups, **terms) -> Objective:
    return Objective(
        net=net,
        process=Flow("linear", "uniform"),
        terms=terms,
        label_drop=0.1,
        null_class=net.num_classes,
        groups=groups,
    )


@pytest.mark.parametrize("tokens", [1, 3, 16, 255, 256])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.2, 0.3, 0.5), (3.0, 1.0, 7.0, 2.0)])
def test_every_token_has_a_group_and_shares_are_kept_within_one(tokens, shares):
    sizes = GroupSettings(shares).sizes(tokens)
    assert sizes.sum() == tokens
    exact = tokens * np.array(shares) / sum(shares)
    assert np.all(np.abs(sizes - exact) < 1)


def test_groups_are_random_for_each_sample_and_of_their_sizes():
    groups = GroupSettings((0.25, 0.75))
    ids = np.asarray(groups.ids(groups.draw(jax.random.key(0), 200, 16)))
    assert np.all((ids == 0).sum(axis=1) == 4)
    assert np.all(np.abs((ids == 0).mean(axis=0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 200))


def test_a_share_of_whole_samples_is_in_the_second_group():
    groups = GroupSettings((0.5, 0.5), full_sample_prob=0.3)
    ids = np.asarray(groups.ids(groups.draw(jax.random.key(0), 1000, 16)))
    whole = np.all(ids == 1, axis=1)
    assert abs(whole.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 1000)
    assert np.all((ids[~whole] == 0).sum(axis=1) == 8)


@pytest.mark.slow
def test_pixels_and_tokens_are_mixed_alike():
    """A token's pixels are those of the latents at its own time."""
    net = lively.make()
    x, _, _ = lively.inputs(net)
    patch = net.settings.patch_size
    tokens = (net.side // patch) ** 2
    ids = jax.random.randint(jax.random.key(1), (len(x), tokens), 0, 3)
    t = jax.random.uniform(jax.random.key(2), (len(x), 3))
    mixed = by_group(lambda t: jnp.broadcast_to(t[:, None, None, None], x.shape), t, ids)
    np.testing.assert_array_equal(
        mixed[:, ::patch, ::patch, 0].reshape(len(x), tokens), of_each_token(t, ids)
    )
    assert of_pixels(ids, net.side).shape == (*x.shape[:-1], 1)


def test_losses_by_time_count_tokens_at_their_own_times():
    net = lively.make()
    loss = objective(net, GroupSettings((0.25, 0.75), dual_time=True), flow=TERMS["flow"](1.0))
    x, _, y = lively.inputs(net)
    draws = loss.draw(jax.random.key(3), x)
    params = lively.parameters(net)
    batch = loss.forward(params, x, y, draws)
    each, times = batch.squared_error(batch.out.pred), of_each_token(batch.t, batch.ids)
    total, metrics = loss(params, x, y, draws)
    np.testing.assert_allclose(total, np.mean((batch.out.pred - batch.target) ** 2), rtol=1e-5)
    found = metrics["loss_by_time/flow"]
    bucket = np.minimum((np.asarray(times) * TIME_BUCKETS).astype(int), TIME_BUCKETS - 1)
    for i in range(TIME_BUCKETS):
        assert found.count[i] == np.sum(bucket == i)
        np.testing.assert_allclose(found.total[i], np.sum(np.asarray(each)[bucket == i]), rtol=1e-5)


def test_steps_of_the_teacher_are_those_of_ddpm_from_1_on():
    """As far back as max_interval x 1000 - 1, each as likely; from step 0 forward to 1."""
    steps = np.array([0, 1, 150, 500, 999])
    t = jnp.asarray((steps + 1) / STEPS, jnp.float32)
    draw = (jnp.arange(200) + 0.5) / 200
    both = jnp.broadcast_to(draw, (len(t), 200))
    found = DDPM().less_noisy(t[:, None], both, 0.2) * STEPS - 1
    expected = np.clip(steps[:, None] - np.arange(200), 1, 999)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_two_groups_of_one_time_with_full_attention_train_as_none():
    net = lively.make()
    x, _, y = lively.inputs(net)
    params = lively.parameters(net)
    plain = objective(net, GroupSettings(), flow=TERMS["flow"](1.0))
    draws = plain.draw(jax.random.key(4), x)
    grouped = replace(plain, groups=GroupSettings((0.5, 0.5)))
    both = grouped.draw(jax.random.key(4), x)
    np.testing.assert_array_equal(both.noise, draws.noise)
    np.testing.assert_allclose(
        grouped(params, x, y, both)[0], plain(params, x, y, draws)[0], rtol=1e-6
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"objective.groups.shares": (0.5, -1.0)}, r"groups.shares = \(0.5, -1.0\): each must be"),
        ({"objective.groups.dual_time": True}, "dual_time = True: needs at least two shares"),
        (
            {"objective.groups.separate_attention": True},
            "separate_attention = True: needs at least two shares",
        ),
        (
            {"objective.groups.shares": (1.0,) * 3, "objective.groups.full_sample_prob": 0.1},
            "full_sample_prob = 0.1: needs two groups, not 3",
        ),
        ({"objective.groups.shares": (1.0,) * 9}, "must not be more than 8"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        tiny.experiment(changes)


@pytest.mark.parametrize(
    "term, groups, says",
    [
        ({"teacher_time": "same"}, {}, "teacher_time = 'same': needs groups of tokens"),
        ({"teacher_time": "self_flow_clean"}, {}, "needs groups of tokens"),
        ({"teacher_groups": False}, TWO, "teacher_groups = False: .* use self_flow"),
        (
            {"teacher_time": "same", "teacher_groups": False},
            TWO,
            "teacher_groups = False: .* use self_flow",
        ),
        ({"teacher_time": "later"}, {}, "teacher_time = 'later': must be one of sra, same"),
        ({"teacher_labels": "none"}, {}, "teacher_labels = 'none': must be one of dropped, given"),
        ({"distance": "cos"}, {}, "distance = 'cos': must be one of cosine_tokens, cosine"),
        ({"max_interval": 1.5}, {}, r"max_interval = 1.5: must lie in \[0, 1\]"),
        ({"teacher_depth": 9}, {}, "reads the tokens of block 9"),
    ],
)
def test_alignments_that_cannot_be_are_refused(term, groups, says):
    terms = {"flow": {"weight": 1.0}, "self_alignment": {**ALIGNED, **term}}
    with pytest.raises(ConfigError, match=says):
        tiny.experiment({"objective.terms": terms, **groups})


def test_the_bound_of_a_step_is_refused_where_an_image_has_two():
    with pytest.raises(ValueError, match="gives it several; turn that off"):
        TERMS["variational_bound"](1.0).check_groups(GroupSettings((0.5, 0.5), dual_time=True))


def test_the_teacher_of_self_flow_sees_the_whole_image_at_the_earlier_time():
    net = lively.make()
    groups = GroupSettings((0.25, 0.75), dual_time=True)
    term = SelfAlignment(0.5, 1, 2, teacher_time="self_flow", teacher_groups=False)
    loss = objective(net, groups, flow=TERMS["flow"](1.0), self_alignment=term)
    x, _, y = lively.inputs(net)
    draws = loss.draw(jax.random.key(3), x)
    params = lively.parameters(net)
    batch = loss.forward(params, x, y, draws, params)
    seen, t, ids = term.teacher_inputs(batch, draws.terms["self_alignment"])
    assert ids is None
    np.testing.assert_array_equal(t, batch.t.min(axis=1))
    np.testing.assert_array_equal(seen, loss.process.perturb(x, draws.noise, t))
