"""Ancestral sampling and DDIM through plans, guidance and compiled programs, of a tiny DiT."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiers import slow_but

from ig_jax import prng
from ig_jax.config.run_config import ConfigError
from ig_jax.diffusion import process
from ig_jax.diffusion.ddpm import DDPM
from ig_jax.errors import UserError
from ig_jax.generation import cost as sampling_cost
from ig_jax.generation import plan as sampling_plan
from ig_jax.guidance import KINDS, Guidance, Guided, GuideModel
from ig_jax.programs import dry_run
from ig_jax.programs import search as search_program
from ig_jax.samplers import SAMPLERS
from ig_jax.search.space import Candidate

STEPS = 6
DIT = {
    "model.name": "dit",
    "process": {"name": "ddpm"},
    "sample.sampler": {"name": "ancestral", "num_steps": STEPS, "clip_denoised": True},
}
NAMES = pytest.mark.parametrize("name", ["ancestral", "ddim"])
ONE_NAME = pytest.mark.parametrize("name", slow_but(["ancestral"], ["ancestral", "ddim"]))
SCALES = {"ig": 2.0, "cfg": 1.5, "autoguidance": 1.25}


def lively(shapes, seed: int):
    """Every leaf drawn, those that start at zero too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def pipe():
    exp = tiny.experiment(DIT)
    return replace(exp.pipeline, params=lively(exp.abstract_params, 0))


# What a sampler is given.


def guided(pipe, y) -> Guided:
    return Guided(
        net=pipe.net,
        params=pipe.params,
        process=DDPM(),
        y=y,
        null_class=pipe.num_classes,
        scales=SCALES,
        channels={},
        readout=1,
        guide=GuideModel(pipe.net, DDPM(), lively(pipe.params, 1)),
    )


@pytest.mark.parametrize(
    "on", slow_but([KINDS], [(), *[(kind,) for kind in KINDS], ("ig", "cfg"), KINDS])
)
def test_guided_noise_is_that_of_the_guided_velocity_and_the_variance_is_the_labels_own(pipe, on):
    y, t, kinds = jnp.array([3, 7]), jnp.float32(0.4), frozenset(on)
    x = prng.sample_normal(prng.sample_keys(0, jnp.arange(2)), pipe.latent_shape, prng.LATENTS)
    field = guided(pipe, y).field(kinds, kinds)
    noise, variance = field.noise_and_variance(x, t)
    expected = process.noise_from_velocity(DDPM().coefficients(t), field.velocity(x, t), x)
    np.testing.assert_allclose(noise, expected, atol=2e-5)
    alone = pipe.net(pipe.params, x, DDPM().condition_time(jnp.full(2, t)), y)
    np.testing.assert_allclose(variance, alone.variance, atol=1e-5)
    assert (np.abs(noise - alone.pred).max() > 0.01) == bool(on)


# Programs.


@pytest.mark.slow
@NAMES
def test_a_sample_is_its_own_in_any_batch_and_a_trajectory_ends_in_it(pipe, name):
    sampler = SAMPLERS[name](STEPS, clip_denoised=True)
    call = {"seed": 3, "sampler": sampler, "ig": 2.0, "cfg": (1.5, 0.0, 0.6)}
    whole, states = pipe.sample_latents([1, 2, 3, 4], trajectory=True, **call)
    assert states.shape == (4, STEPS, 8, 8, 1)
    np.testing.assert_array_equal(states[:, -1], whole)
    np.testing.assert_allclose(pipe.sample_latents([1, 2], **call), whole[:2], atol=1e-4)
    assert np.abs(whole - pipe.sample_latents([1, 2, 3, 4], **call | {"seed": 4})).max() > 0.1


@pytest.mark.slow
def test_the_noise_of_a_step_is_that_of_the_samples_own_address(pipe):
    """From the states on the way: what is left beside the mean is the noise."""
    _, states = pipe.sample_latents([5, 6], seed=2, ig=1.0, cfg=1.0, trajectory=True)
    sampler = pipe.sampling.sampler
    field = guided(pipe, jnp.array([5, 6])).field(frozenset(), frozenset())
    keys = prng.sample_keys(2, jnp.arange(2))
    x, times = jnp.asarray(states[:, 1]), sampler.grid().tolist()
    for address, near in ((prng.FIRST_STEP + 2, True), (prng.FIRST_STEP + 3, False)):
        noise = prng.sample_normal(keys, pipe.latent_shape, address)
        found = sampler.step(field, x, jnp.float32(times[2]), jnp.float32(times[3]), noise)
        assert (np.abs(found - states[:, 2]).max() < 1e-4) == near


@ONE_NAME
def test_other_scales_need_no_other_program(pipe, name):
    generator = pipe.generator(decode=lambda x: x)
    y, indices = jnp.zeros(4, jnp.int32), jnp.arange(4)
    found = []
    for scale in (1.5, 2.5):
        given = {k: Guidance(scale, 0.0, 0.7) for k in ("ig", "cfg")}
        chosen = {"guidances": given, "sampler": SAMPLERS[name](STEPS)}
        found.append(generator(pipe.params, np.uint32(0), indices, y, **chosen).decoded)
    assert generator._program._cache_size() == 1 and np.abs(found[0] - found[1]).max() > 0.01


# Plans, costs, dry runs, searches.


@NAMES
def test_a_plan_holds_the_times_of_the_kept_steps_and_cuts_guidance_there(name):
    cfg = Guidance(1.5, 0.0, 0.501)  # the time of step 500 is inside
    sampler = SAMPLERS[name](3)
    found = sampling_plan.plan(DDPM(), sampler, {"cfg": cfg})
    assert found.grid == (1.0, 0.501, 0.001, 0.0)
    assert [(s.start, s.stop, set(s.on)) for s in found.segments] == [
        (0, 1, set()),
        (1, 3, {"cfg"}),
    ]


def test_costs_and_the_dry_run_count_one_evaluation_a_step():
    exp = tiny.experiment({**DIT, "sample.cfg.high": 0.5, "sample.ig.scale": 1.0})
    times = exp.config.sample.sampler.grid()[:-1]
    expected = STEPS + np.sum(times <= 0.5)
    assert sampling_cost.cost(exp.pipeline.generator())["evaluations"] == expected
    text = dry_run.describe(exp)
    assert f"sampling: Ancestral, {STEPS} steps, {expected} network evaluations" in text


def test_a_search_may_vary_steps_and_eta():
    exp = tiny.experiment({**DIT, "sample.sampler": {"name": "ddim", "num_steps": 6, "eta": 0.5}})
    s = exp.config.sample
    assert (
        search_program.numbers(s, None).items()
        >= {"sampler.num_steps": 6, "sampler.eta": 0.5}.items()
    )
    point = Candidate.of({"sampler.num_steps": 9, "sampler.eta": 0.25})
    sampler = search_program.apply_candidate(s, point, ()).sampler
    assert (sampler.num_steps, sampler.eta) == (9, 0.25)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sampler": {"eta": (0.0, 2.0)}}, "sampler.eta=2: eta = 2.0: must lie in"),
        ({"sampler": {"num_steps": (1001.0,)}}, "sampler.num_steps=1001: num_steps = 1001: must"),
    ],
)
def test_a_search_refuses_a_sampler_that_there_is_not_before_it_begins(values, sentence):
    exp = tiny.experiment(
        {
            **DIT,
            "sample.sampler": {"name": "ddim", "num_steps": 6, "eta": 0.5},
            "search.space.values": values,
        }
    )
    with pytest.raises(UserError, match=f"search.space.values: {sentence}"):
        search_program.compared(exp.config)


# Processes and networks that they are not for.


@NAMES
def test_a_run_of_another_process_is_refused_naming_both(name):
    sentence = (
        f"sampler.name = '{name}': {SAMPLERS[name].__name__} takes the steps of DDPM, which Flow"
    )
    with pytest.raises(ConfigError, match=sentence):
        tiny.experiment({"sample.sampler": {"name": name, "num_steps": 4}})


SIT = {**DIT, "model.name": "sit"}


def test_ancestral_sampling_without_a_variance_is_refused_and_ddim_is_not():
    with pytest.raises(ConfigError, match="'ancestral': Ancestral reads a variance, which this"):
        tiny.experiment(SIT)
    tiny.experiment({**SIT, "sample.sampler": {"name": "ddim", "num_steps": 4}})


def test_a_call_is_refused_likewise(pipe):
    plain = replace(pipe, process=tiny.experiment().config.process)
    with pytest.raises(UserError, match="sampler: DDIM takes the steps of DDPM, which Flow does"):
        plain.sample([1], sampler="ddim")


@NAMES
def test_a_shift_of_times_is_refused(name):
    changes = {"sample.sampler": {"name": name, "num_steps": 4}, "sample.time_shift": 2.0}
    with pytest.raises(ConfigError, match="this sampler has its own; set it to 1"):
        tiny.experiment({**DIT, **changes})
