"""Sampling: sample i is sample i in any batch; files are whole, resumable and named by settings."""

import errno
import json
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiers import slow_but

from ig_jax import guidance
from ig_jax.config.run_config import ConfigError
from ig_jax.errors import UserError
from ig_jax.generation import batches as generation_batches
from ig_jax.generation import cost as sampling_cost
from ig_jax.generation import plan as sampling_plan
from ig_jax.generation import sample_files
from ig_jax.guidance import Guidance, Segment
from ig_jax.monitoring import flops
from ig_jax.parallel import lock
from ig_jax.parallel.mesh import prefetch, replicated
from ig_jax.plots import image_grid
from ig_jax.programs import run_record, sample
from ig_jax.samplers import SAMPLERS

NUM = 20


@pytest.fixture(scope="module")
def trained():
    return tiny.trained()


@pytest.fixture
def workdir(trained, tmp_path):
    return trained.copy(tmp_path)


def images_of(trained, indices, generator=None, *, seed=0, **chosen) -> np.ndarray:
    """Samples `indices` under the raw weights of the trained run."""
    generator = generator or trained.exp.pipeline.generator()
    weights = jax.device_put(
        jax.device_get(trained.outcome.state.params), replicated(generator.mesh)
    )
    parts = list(
        generation_batches.sample_batches(generator, weights, seed, np.asarray(indices), **chosen)
    )
    assert [i for part in parts for i in part[0]] == list(indices)
    return np.concatenate([part[1] for part in parts])


@pytest.fixture(scope="module")
def generator(trained):
    return trained.exp.pipeline.generator()


@pytest.fixture(scope="module")
def images(trained, generator):
    return images_of(trained, range(NUM), generator)


def test_samples_differ_from_each_other_and_from_seed_to_seed(trained, images, generator):
    assert images.shape == (NUM, 8, 8, 1) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(NUM, -1), axis=0)) == NUM
    other = images_of(trained, range(NUM), generator, seed=1)
    assert (other != images).reshape(NUM, -1).any(axis=1).all()


# Tight: rounding decides which steps it takes, and so moves a sample by about its tolerance.
DOPRI5 = SAMPLERS["dopri5"](num_steps=500, rtol=1e-5, atol=1e-5)
MULTISTEP = {name: SAMPLERS[name](5) for name in ("dpmpp_2m", "adams_bashforth")}
CHOSEN = {"euler": None, "dopri5": DOPRI5, **MULTISTEP}
samplers = pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(sampler, id=name, marks=() if name == "euler" else pytest.mark.slow)
        for name, sampler in CHOSEN.items()
    ],
)


@pytest.fixture(scope="module")
def latents_generator(trained):
    """Gives samples before they are decoded: 8 bits would hide or double a difference."""
    return trained.exp.pipeline.generator(decode=lambda x: x)


@pytest.fixture(scope="module")
def latents_before(trained, latents_generator):
    """Of a sampler: its samples by the program of the config."""

    @cache
    def before(sampler):
        return images_of(trained, range(NUM), latents_generator, sampler=sampler)

    return before


SPLITS = {
    "backwards": [range(NUM)[::-1]],
    "shuffled": [np.random.default_rng(0).permutation(NUM)],
    "few": [[3]],
    "far apart": [[19, 500, 7], [12_345, 0]],
    "split": [range(13), range(13, NUM)],
}


@samplers
@pytest.mark.parametrize("name", SPLITS)
def test_a_sample_has_the_same_bits_in_any_order_and_split_of_a_batch(
    trained, latents_before, latents_generator, sampler, name
):
    for indices in SPLITS[name]:
        got = images_of(trained, indices, latents_generator, sampler=sampler)
        for index, latents in zip(indices, got, strict=True):
            if index < NUM:
                np.testing.assert_array_equal(latents, latents_before(sampler)[index])


def allowed(sampler, latents) -> float:
    """How far two solutions may be apart: by rounding, or by what the adaptive solver promises.

    Rounding decides which steps that takes; in each it may err by its tolerances.
    """
    if sampler is None or not sampler.adaptive:
        return 1e-5
    return sampler.num_steps * (sampler.atol + sampler.rtol * np.abs(latents).max())


# Another batch size is another program, whose matrix products may add in another order.
@samplers
@pytest.mark.parametrize(
    ("batch", "devices"), [(6, 2), (NUM, 1), pytest.param(1, 1, marks=pytest.mark.slow)]
)
def test_a_sample_is_the_same_in_any_batch_size_and_on_any_number_of_devices(
    trained, latents_before, sampler, batch, devices
):
    expected = latents_before(sampler)
    exp = tiny.experiment({"sample.batch_size": batch}, jax.devices()[:devices])
    generator = exp.pipeline.generator(decode=lambda x: x)
    got = images_of(trained, range(NUM), generator, sampler=sampler)
    apart = np.abs(got - expected).max()
    assert apart <= allowed(sampler, expected)
    # Any other sample is much farther away than that.
    others = np.abs(got[:, None] - expected[None]).max(axis=(2, 3, 4))
    assert (others + 9 * np.eye(NUM)).min() > 10 * allowed(sampler, expected)


@pytest.mark.slow
def test_dopri5_arrives_where_many_steps_of_heun_do(trained, latents_before, latents_generator):
    """The same start and guidance, all the way: only the integration differs."""
    expected = latents_before(DOPRI5)
    heun = SAMPLERS["heun2"](500)
    got = images_of(trained, range(NUM), latents_generator, sampler=heun)
    assert np.abs(got - expected).max() <= allowed(DOPRI5, expected)


@pytest.mark.slow
def test_a_sample_that_needs_more_steps_than_it_may_take_is_refused(trained, generator):
    few = replace(DOPRI5, num_steps=3)
    with pytest.raises(
        UserError, match="sample 0 and 19 others are not finite: .*num_steps = 3.* rtol = 1e-05"
    ):
        images_of(trained, range(NUM), generator, sampler=few)


def test_a_sample_that_is_no_number_is_refused_by_its_index(trained, generator):
    """Guidance without bounds in place of a run that went wrong."""
    given = {"ig": Guidance(np.inf, 0.0, 1.0)}
    sentence = "sample 7 and 12 others are not finite: lower the guidance scales"
    with pytest.raises(UserError, match=sentence):
        images_of(trained, range(7, NUM), generator, guidances=given)


def programs(generator) -> int:
    return generator._program._cache_size()


@samplers
def test_other_scales_of_the_same_guidances_need_no_other_program(trained, sampler):
    s = trained.exp.config.sample
    generator = trained.exp.pipeline.generator()
    found = []
    for scale in (1.5, 2.5):
        given = {k: replace(s.guidances[k], scale=scale) for k in ("ig", "cfg")}
        found.append(images_of(trained, range(NUM), generator, guidances=given, sampler=sampler))
    assert programs(generator) == 1
    assert (found[0] != found[1]).reshape(NUM, -1).any(axis=1).all()
    unguided = guidance.only(s.guidances, ())
    images_of(trained, range(NUM), generator, guidances=unguided, sampler=sampler)
    assert programs(generator) == 2


def plan(changes=(), **given: Guidance) -> sampling_plan.Plan:
    config = tiny.experiment(dict(changes)).config
    return sampling_plan.plan(
        config.process, config.sample.sampler, given, config.sample.time_shift
    )


def test_a_plan_holds_whatever_decides_the_program_but_no_scale():
    ig = Guidance(2.0, 0.0, 1.0)
    assert plan(ig=ig) == plan(ig=replace(ig, scale=3.0))
    others = [
        plan(ig=replace(ig, scale=1.0)),
        plan(ig=replace(ig, low=0.5)),
        plan(ig=replace(ig, channels=1)),
        plan(cfg=ig),
        plan({"sample.sampler.num_steps": 4}, ig=ig),
        plan({"sample.sampler.name": "heun2"}, ig=ig),
        plan({"sample.time_shift": 2.0}, ig=ig),
        plan({"process.prediction": "noise"}, ig=ig),
    ]
    assert len({plan(ig=ig), *others}) == len(others) + 1
    hash(plan(ig=ig))  # jax.jit takes it as static


def test_a_plan_shifts_the_grid_and_guides_by_the_shifted_times():
    shifted = plan({"sample.time_shift": 2.0}, ig=Guidance(2.0, 0.6, 1.0))
    # 2 t / (1 + t) of 1, 2/3, 1/3, 0.
    np.testing.assert_allclose(shifted.grid, [1, 0.8, 0.5, 0], rtol=1e-15)
    on, off = frozenset({"ig"}), frozenset()
    assert shifted.segments == (Segment(0, 2, on, on), Segment(2, 3, off, off))


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, (1, 0)),
        ({"process.path": "vp"}, (1, 1e-3)),
        ({"process.prediction": "noise"}, (1 - 1e-3, 1e-3)),
        ({"process.prediction": "score", "sample.time_shift": 3.0}, (1 - 1e-3, 1e-3)),
        ({"process.path": "vp", "sample.sampler": {"name": "dopri5", "num_steps": 9}}, (1, 1e-3)),
    ],
)
def test_a_plan_goes_from_end_to_end_of_the_interval_that_the_process_allows(changes, ends):
    grid = plan(changes, ig=Guidance(2.0, 0.0, 1.0)).grid
    assert (grid[0], grid[-1]) == pytest.approx(ends, abs=1e-15)
    assert list(grid) == sorted(grid, reverse=True)


def test_a_plan_for_a_sampler_of_its_own_steps_has_a_piece_for_every_interval():
    adaptive = {"sample.sampler": {"name": "dopri5", "num_steps": 9}}
    found = plan(adaptive, ig=Guidance(2.0, 0.2, 0.7), cfg=Guidance(1.0, 0.3, 0.4))
    assert found.grid == (1, 0.7, 0.2, 0)
    assert [s.on for s in found.segments] == [frozenset(), frozenset({"ig"}), frozenset()]


def test_only_a_sampler_that_is_guided_at_the_end_of_steps_gets_a_cut_for_it():
    given = {"cfg": Guidance(2.0, 0.5, 1.0)}
    for name, cuts in (("heun", 2), ("heun2", 3)):
        assert len(plan({"sample.sampler.name": name}, **given).segments) == cuts


def labels(mode, indices, seed=0):
    config = tiny.experiment({"sample.labels": mode}).config
    found = generation_batches.labels_of(config.sample, 10, seed, np.asarray(indices))
    assert found.dtype == np.int32
    return found


@pytest.mark.parametrize("mode", ["random", "balanced", "3,1,4"])
def test_a_label_depends_on_seed_and_index_alone(mode):
    order = np.random.default_rng(0).permutation(57)
    together = labels(mode, np.arange(57))
    np.testing.assert_array_equal(labels(mode, order), together[order])
    np.testing.assert_array_equal([labels(mode, [i])[0] for i in range(57)], together)


def test_balanced_labels_of_any_prefix_differ_in_number_by_at_most_one():
    found = labels("balanced", np.arange(100))
    for n in range(1, 101):
        counts = np.bincount(found[:n], minlength=10)
        assert counts.max() - counts.min() <= 1
    assert len(np.unique(found.reshape(10, 10), axis=0)) == 10  # each round in an order of its own
    assert not np.array_equal(found, labels("balanced", np.arange(100), seed=1))


def test_random_labels_are_uniform_and_differ_from_seed_to_seed():
    found = labels("random", np.arange(4000))
    assert found.min() == 0 and found.max() == 9
    assert np.abs(np.bincount(found) - 400).max() < 5 * np.sqrt(360)  # five standard deviations
    assert np.mean(found == labels("random", np.arange(4000), seed=1)) < 0.2


def test_given_labels_repeat_and_may_be_the_null_class():
    np.testing.assert_array_equal(labels("3, 10,0", np.arange(5)), [3, 10, 0, 3, 10])


def test_weights_are_picked_by_name(trained):
    state, exp = trained.outcome.state, trained.exp
    wanted = {
        "raw": state.params,
        "ema": state.ema["0.9"],
        "0.9": state.ema["0.9"],
        "0.8": state.ema["0.8"],
    }
    found = {
        which: run_record.load_weights(tiny.experiment({"sample.weights": which}), trained.workdir)
        for which in wanted
    }
    for which, weights in wanted.items():
        step, params = found[which]
        assert step == 24
        jax.tree.map(np.testing.assert_array_equal, params, weights)
    kernels = [w["final_layer"]["linear"]["kernel"] for w in wanted.values()]
    assert len({np.asarray(k).tobytes() for k in kernels}) == 3
    assert exp.config.sample.weights == "ema"


def test_a_decay_that_the_config_lacks_is_refused():
    with pytest.raises(ConfigError, match="sample.weights = '0.5': must be ema"):
        tiny.experiment({"sample.weights": "0.5"})


def test_a_decay_that_the_checkpoint_lacks_is_refused_with_those_it_has(trained):
    changes = {"train.ema_decays": (0.5,), "sample.weights": "0.5"}
    with pytest.raises(UserError, match="sample.weights = '0.5': .* raw and the averages 0.9, 0.8"):
        run_record.load_weights(tiny.experiment(changes), trained.workdir)


def test_a_run_writes_every_picture_a_grid_and_one_array_of_all(trained, workdir, images):
    exp = tiny.experiment({"sample.weights": "raw"})
    target = sample.run(exp, workdir)
    num = exp.config.sample.num
    names = [f"{i:06d}.png" for i in range(num)]
    assert sorted(p.name for p in target.iterdir()) == sorted(
        [*names, "grid.png", "samples.npz", "settings.json"]
    )
    with np.load(target / "samples.npz") as arrays:
        found, found_labels = arrays["arr_0"], arrays["arr_1"]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, images[:num])
    np.testing.assert_array_equal(found, [image_grid.load(target / name, 1) for name in names])
    np.testing.assert_array_equal(found_labels, labels("balanced", np.arange(num)))
    grid = image_grid.load(target / "grid.png", 3)
    assert grid.shape[0] > 2 * 32 and grid.shape[1] > 10 * 32 and len(np.unique(grid)) > 50
    settings = json.loads((target / "settings.json").read_text())
    assert settings["checkpoint_step"] == 24 and settings["weights"] == "raw"
    assert settings["ig"] == {"scale": 2.0, "low": 0.0, "high": 1.0, "channels": 0}
    assert target.parent == workdir / "samples"


def test_an_interrupted_run_makes_only_what_is_missing(workdir):
    target = sample.run(tiny.experiment(), workdir)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in target.glob("0*.png")}
    gone = ["000003.png", "000010.png"]
    for name in [*gone, "samples.npz", "grid.png"]:
        (target / name).unlink()
    assert sample.run(tiny.experiment({"sample.num": 14}), workdir) == target
    for name, (content, written) in before.items():
        assert (target / name).read_bytes() == content
        assert ((target / name).stat().st_mtime_ns == written) == (name not in gone)
    with np.load(target / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (14, 8, 8, 1) and arrays["arr_1"].shape == (14,)
    assert len(list(target.glob("0*.png"))) == 14


def files_of(target) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in target.iterdir()}


@pytest.mark.parametrize("kind", slow_but(["npz"], ["png", "npz"]))
def test_one_kind_of_file_alone_holds_the_same_samples(workdir, tmp_path, kind):
    both = files_of(sample.run(tiny.experiment(), workdir))
    other = tiny.trained().copy(tmp_path / "other")
    alone = files_of(sample.run(tiny.experiment({"sample.files": (kind,)}), other))
    assert {name: both[name] for name in alone} == alone
    pictures_there = {name for name in both if name[0].isdigit()}
    missing = {"png": {"samples.npz"}, "npz": pictures_there}[kind]
    assert set(both) - set(alone) == missing


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("npz",), ("png", "npz")], ids=["npz", "both"])
def test_a_run_that_broke_off_goes_on_with_what_is_missing(workdir, tmp_path, monkeypatch, kinds):
    """Batch by batch, and then with more samples: what is there is never drawn again."""
    changes = {"sample.files": kinds, "sample.batch_size": 4}
    unbroken = files_of(sample.run(tiny.experiment(changes), tiny.trained().copy(tmp_path / "b")))
    drawn, batches = [], sample.sample_batches

    def breaks(generator, params, seed, indices, stop=2):
        drawn.append(indices.tolist())
        for i, batch in enumerate(batches(generator, params, seed, indices)):
            if i == stop:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(sample, "sample_batches", breaks)
    with pytest.raises(KeyboardInterrupt):
        sample.run(tiny.experiment(changes), workdir)
    target = sample.run(tiny.experiment(changes), workdir)
    assert drawn == [list(range(12)), [8, 9, 10, 11]]
    assert files_of(target) == unbroken
    sample.run(tiny.experiment(changes), workdir)
    sample.run(tiny.experiment(changes | {"sample.num": 15}), workdir)
    assert drawn[2:] == [[], [12, 13, 14]]
    with np.load(target / "samples.npz") as arrays:
        assert len(arrays["arr_0"]) == len(arrays["arr_1"]) == 15
    assert not list(target.glob(".*"))


def test_fewer_samples_than_there_are_take_none_away(workdir):
    target = sample.run(tiny.experiment({"sample.files": ("npz",)}), workdir)
    before = (target / "samples.npz").read_bytes()
    sample.run(tiny.experiment({"sample.files": ("npz",), "sample.num": 3}), workdir)
    assert (target / "samples.npz").read_bytes() == before


@pytest.mark.slow
def test_what_is_damaged_is_made_again_and_the_rest_is_not(workdir, monkeypatch):
    exp = tiny.experiment()
    target = sample.run(exp, workdir)
    whole = {f.name: f.read_bytes() for f in target.iterdir()}
    png = whole["000000.png"]
    damaged = [b"", png[:40], png[:-1], bytes(len(png)), png.replace(b"IDAT", b"IDAX"), b"x" * 9]
    drawn = []
    batches = sample.sample_batches
    monkeypatch.setattr(
        sample, "sample_batches", lambda *a: drawn.append(a[-1].tolist()) or batches(*a)
    )
    for kept in (None, b"", whole["samples.npz"][:-200], b"PK", bytes(500)):
        for i, content in enumerate(damaged):
            (target / f"{i:06d}.png").write_bytes(content)
        image_grid.save(target / "000006.png", np.zeros((9, 8, 1), np.uint8))  # of another size
        (target / "000007.png").unlink()
        (target / "000007.png").mkdir()
        (target / "000007.png").rmdir()
        (target / "settings.json").write_bytes(b"")
        (target / "samples.npz").unlink()
        if kept is not None:
            (target / "samples.npz").write_bytes(kept)
        assert sample.run(exp, workdir) == target
        assert {f.name: f.read_bytes() for f in target.iterdir()} == whole
    assert drawn == [list(range(8))] * 5
    (target / "000003.png").write_bytes(b"")
    sample.run(exp, workdir)  # samples.npz has it
    assert drawn[-1] == [] and (target / "000003.png").read_bytes() == whole["000003.png"]


def test_the_same_samples_are_not_drawn_twice_at_a_time_but_others_are(workdir):
    exp, other = tiny.experiment(), tiny.experiment({"sample.seed": 1, "sample.num": 4})
    step = run_record.load_weights(exp, workdir)[0]
    target = run_record.folder(workdir / "samples", run_record.settings(exp, step))
    with lock.held(target), lock.held(workdir):  # training may go on meanwhile
        with pytest.raises(UserError, match=f"{re.escape(str(target))} is in use by process"):
            sample.run(exp, workdir)
        sample.run(other, workdir)


def test_a_full_disk_is_told_and_what_is_drawn_is_kept(workdir, monkeypatch):
    write, calls = sample_files.Archive.write, []

    def full(self, indices, images):
        calls.append(len(indices))
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, indices, images)

    monkeypatch.setattr(sample_files.Archive, "write", full)
    exp = tiny.experiment({"sample.batch_size": 4})
    with pytest.raises(
        UserError, match="No space left on device .*free for .*what is done is kept"
    ):
        sample.run(exp, workdir)
    target = sample.run(exp, workdir)
    assert calls == [4, 4, 4, 4] and len(list(target.glob("0*.png"))) == 12


def test_the_next_batch_is_begun_before_one_is_handed_out():
    begun = []

    def items():
        for i in range(4):
            begun.append(i)
            yield i

    seen = [(item, list(begun)) for item in prefetch(items())]
    assert seen == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2, 3]), (3, [0, 1, 2, 3])]
    assert list(prefetch(iter(()))) == []


def test_an_image_costs_a_head_a_step_for_internal_guidance_and_twice_the_network_within_cfg():
    exp = tiny.experiment()
    given = exp.config.sample.guidances
    generator = exp.pipeline.generator()
    once = flops.forward(exp.net, exp.abstract_params, heads=())
    head = flops.forward(exp.net, exp.abstract_params) - once

    def cost(**kinds):
        guidances = guidance.only(given, ()) | kinds
        found = sampling_cost.cost(generator, guidances=guidances)
        return found["evaluations"], found["flops"]

    assert 0 < head < once / 10
    assert cost() == (3, 3 * once)
    assert cost(ig=Guidance(2.0, 0.0, 1.0)) == (3, 3 * (once + head))
    assert cost(cfg=Guidance(2.0, 0.0, 0.7)) == (5, 5 * once)  # times 1, 2/3 and 1/3
    both = cost(ig=Guidance(2.0, 0.5, 1.0), cfg=Guidance(2.0, 0.0, 0.7))
    assert both == (5, 5 * once + 3 * head)  # of 1 alone, and of 2/3 twice
    dopri5 = tiny.experiment({"sample.sampler": {"name": "dopri5", "num_steps": 9}})
    assert sampling_cost.cost(dopri5.pipeline.generator()) is None


DECISIVE = {
    "sample.seed": 1,
    "sample.labels": "random",
    "sample.weights": "raw",
    "sample.sampler.num_steps": 4,
    "sample.sampler.name": "heun",
    "sample.ig.scale": 1.5,
    "sample.ig.high": 0.5,
    "sample.cfg.scale": 1.5,
    "sample.cfg.low": 0.5,
    "sample.cfg.channels": 1,
    "sample.autoguidance.low": 0.5,
    "sample.time_shift": 2.0,
    "sample.token_groups.share": 0.25,
    "process.path": "cosine",
    "process.prediction": "noise",
}


def test_every_setting_that_changes_samples_has_a_folder_of_its_own(trained):
    def folder(changes, step=24):
        return run_record.folder(tiny.ROOT, run_record.settings(tiny.experiment(changes), step))

    base = folder({})
    folders = {folder({name: value}) for name, value in DECISIVE.items()}
    assert len(folders | {base, folder({}, step=25)}) == len(DECISIVE) + 2
    assert base == folder({"sample.num": 13, "sample.batch_size": 4})
    assert base == folder({"sample.guide.step": 6})  # autoguidance is off
    assert base.name.startswith("step24-ema-euler3-ig2-cfg1.2-seed0-")


def test_drawing_samples_sends_nothing_between_devices(trained):
    generator = trained.exp.pipeline.generator()
    guidances = trained.exp.config.sample.guidances
    chosen = generator.plan()
    scales = {kind: np.float32(g.scale) for kind, g in guidances.items()}
    rows = jnp.arange(20, dtype=jnp.int32)
    given = (trained.weights(), None, {}, scales, np.uint32(0), rows, rows % 10, None)
    program = generator._program.lower(chosen, False, *given).compile().as_text()
    assert "num_partitions=2" in program
    assert not re.findall(r"all-\w+\(|collective-permute\(|reduce-scatter\(", program)


def test_guidance_changes_the_samples_and_a_scale_of_one_does_not(trained):
    """Scale 1 compiles a program without guidance; it must be the limit of the others."""
    given = trained.exp.config.sample.guidances
    generator = trained.exp.pipeline.generator(decode=lambda x: x)
    weights, indices = trained.weights(), jnp.arange(NUM, dtype=jnp.int32)

    def latents(**scales):
        guidances = {k: replace(given[k], scale=w) for k, w in scales.items()}
        found = generator(weights, np.uint32(0), indices, indices % 10, guidances=guidances)
        assert np.all(found.finite)
        return np.asarray(found.decoded)

    off = latents(ig=1.0, cfg=1.0)
    np.testing.assert_allclose(off, latents(ig=1.0 + 1e-4, cfg=1.0 + 1e-4), atol=1e-3)
    assert np.abs(off - latents(ig=2.0, cfg=1.2)).max() > 1e-2


@pytest.mark.parametrize("each_step", slow_but([True], [False, True]))
def test_tokens_are_parted_by_seed_and_index_alone_and_once_or_at_each_step(trained, each_step):
    """With Internal Guidance and CFG on: both branches of a sample have its groups."""

    def generator(share: float, each_step: bool):
        changes = {
            "sample.sampler": {"name": "euler_maruyama", "num_steps": 3},
            "sample.token_groups": {"share": share, "each_step": each_step},
        }
        return tiny.experiment(changes).pipeline.generator(decode=lambda x: x)

    groups = generator(0.3, each_step)
    parted = images_of(trained, range(NUM), groups)
    np.testing.assert_array_equal(images_of(trained, [7, 3], groups), parted[[7, 3]])
    together = images_of(trained, range(NUM), generator(0.0, False))
    full = np.abs(parted - together).reshape(NUM, -1).max(axis=1)
    assert np.all(full > 1e-3) and np.all(np.isfinite(parted))
    other = generator(0.3, not each_step)
    assert np.all(images_of(trained, range(3), other) != parted[:3])


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"share": 1.0}, r"sample.token_groups.share = 1.0: must lie in \[0, 1\)"),
        ({"each_step": True}, "each_step = True: needs a share above 0"),
    ],
)
def test_groups_of_tokens_that_cannot_be_are_refused(changes, rule):
    with pytest.raises(ConfigError, match=rule):
        tiny.experiment({"sample.token_groups": {"share": 0.0, "each_step": False, **changes}})


@pytest.mark.parametrize(
    ("sampler", "noisy"),
    [
        ({"name": "euler_maruyama", "num_steps": 4}, True),
        ({"name": "edm_stochastic", "num_steps": 4}, True),
        ({"name": "edm_stochastic", "num_steps": 4, "s_churn": 0.0}, False),
        ({"name": "euler", "num_steps": 4}, False),
        ({"name": "heun2", "num_steps": 4}, False),
        ({"name": "dopri5", "num_steps": 50}, False),
        ({"name": "ddim", "num_steps": 4, "eta": 0.2}, True),
        ({"name": "ddim", "num_steps": 4}, False),
    ],
)
def test_groups_for_each_step_need_a_sampler_that_adds_noise(sampler, noisy):
    changes = {"sample.token_groups": {"share": 0.5, "each_step": True}, "sample.sampler": sampler}
    if sampler["name"] == "ddim":
        changes["process"] = {"name": "ddpm"}
    if noisy:
        assert tiny.experiment(changes).config.sample.sampler.stochastic
    else:
        with pytest.raises(ConfigError, match="sample.token_groups.each_step = True: .* no noise"):
            tiny.experiment(changes)


def test_a_sampler_named_in_a_call_is_held_to_the_groups(trained):
    changes = {
        "sample.token_groups": {"share": 0.5, "each_step": True},
        "sample.sampler": {"name": "euler_maruyama", "num_steps": 3},
    }
    pipe = replace(tiny.experiment(changes).pipeline, params=trained.weights())
    with pytest.raises(UserError, match="sample.token_groups.each_step = True: Euler adds no"):
        pipe.sample([1], sampler="euler")


@pytest.mark.parametrize("share", [0.01, 0.0624])
def test_a_share_of_less_than_a_token_is_refused_and_the_advice_is_taken(share):
    """The tiny network has 16 tokens."""

    def opened(share: float):
        return tiny.experiment({"sample.token_groups": {"share": share, "each_step": False}})

    with pytest.raises(ConfigError, match=r"share = .*: is less than one .* at least 0.0625$"):
        opened(share)
    assert opened(0.0625).config.sample.token_groups.share == 0.0625


def test_weights_of_a_checkpoint_need_no_matching_optimizer_or_data(trained):
    exp = tiny.experiment({"optim.learning_rate": 1.0, "seed": 5, "train.batch_size": 4})
    assert run_record.load_weights(exp, trained.workdir)[0] == 24
