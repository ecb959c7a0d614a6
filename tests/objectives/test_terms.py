"""What a loss term may own and ask for: a head, draws, tokens of blocks, a weight by epochs."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import lively
import numpy as np
import pytest
import tiny
from vectors import quick_jit

from ig_jax import modes, prng, pytree
from ig_jax.checkpoint.manager import CheckpointError, Checkpoints
from ig_jax.data import loader
from ig_jax.diffusion.flow import Flow
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import Needs, Objective, Term, squared_error
from ig_jax.optim.train_state import TrainState, parted, trained
from ig_jax.parallel.mesh import to_global
from ig_jax.programs import dry_run, export_checkpoint, replay
from ig_jax.training import step, trainer
from ig_jax.types import NONE

FLOW = {"flow": {"weight": 1.0}, "internal_guidance": {"weight": 0.5}}
ALIGNMENT = {"weight": 0.5, "depth": 1, "teacher_depth": 2}
CONTRASTIVE = {"weight": 0.1, "depth": 2, "hidden_size": 16, "features": 8}
HEADS = {"sra2": {"weight": 1.0, "depth": 1}, "self_alignment": ALIGNMENT}
AND_AVERAGES = {**HEADS, "contrastive": CONTRASTIVE}
GROUPS = {
    "objective.groups.shares": (0.25, 0.75),
    "objective.groups.dual_time": True,
    "objective.groups.separate_attention": True,
}
SRA2 = {"objective.terms": {**FLOW, "sra2": {"weight": 1.0, "depth": 1}}}


@dataclass(frozen=True)
class Blurred(Term):
    """A term with all that a term may have: a head, draws, and the teacher's tokens."""

    block: int

    @property
    def needs(self) -> Needs:
        return Needs(taps=(2, self.block), teacher_taps=(self.block,))

    def init(self, key, net):
        width = net.settings.hidden_size
        return {"turn": {"kernel": jax.random.normal(key, (width, width)) / 8}}

    def draw(self, key, x0):
        return {"time": jax.random.uniform(key, (len(x0),))}

    def __call__(self, batch, head=NONE, draws=()):
        t = jnp.clip(batch.t - 0.2 * draws["time"], 0, 1)
        target = batch.teacher.tokens(batch.x_t, t, batch.y, None, (self.block,))[self.block]
        error = batch.out.features[self.block] @ head["turn"]["kernel"] - target
        return jnp.mean(error**2, axis=(1, 2))


@pytest.fixture(autouse=True)
def blurred(monkeypatch):
    monkeypatch.setitem(TERMS, "blurred", Blurred)


ALL = {
    "objective.terms": {
        **FLOW,
        "sra2": {"weight": 1.0, "depth": 1},
        "layersync": {"weight": 0.2, "depth": 1, "target_depth": 2},
        "blurred": {"weight": 0.3, "block": 1},
    }
}


def objective(net, **terms) -> Objective:
    return Objective(net, Flow("linear", "uniform"), terms, 0.0, lively.CLASSES)


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


# Weights.


def test_a_weight_without_a_factor_is_the_number_itself():
    assert TERMS["flow"](0.3).weight_at(jnp.int32(7)) == 0.3


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.2), (149, 0.2), (150, 0.2 * 10**-0.001), (1149, 0.02)]
)
def test_a_weight_decays_by_a_factor_for_each_epoch_behind_the_constant_ones(epoch, expected):
    """The numbers are those of SRA's published schedule: 0.2, then 0.2 10^(-(e - 149) / 1000)."""
    term = TERMS["flow"](0.2, weight_factor=10**-0.001, constant_epochs=149)
    assert term.weight_at(jnp.int32(epoch)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_loss_of_a_step_has_the_weight_of_its_epoch():
    net = lively.make()
    terms = {"flow": TERMS["flow"](2.0, weight_factor=0.1, constant_epochs=1)}
    loss = replace(objective(net, **terms), steps_per_epoch=5)
    x, _, y = lively.inputs(net)
    draws = loss.draw(jax.random.key(0), x)
    of_step = quick_jit(lambda s: loss(lively.parameters(net), x, y, draws, None, s)[1])
    for number, weight in ((0, 2.0), (9, 2.0), (10, 0.2), (14, 0.2), (15, 0.02)):
        found = of_step(jnp.int32(number))
        loss, flow = found["loss"].value, float(found["loss/flow"].value)
        assert loss == pytest.approx(weight * flow, rel=1e-5)


def test_an_epoch_is_the_whole_batches_of_the_data_set():
    exp = tiny.experiment({"train.batch_size": 16})
    assert exp.objective.steps_per_epoch == len(exp.config.data.source) // 16 == 90


# Draws.


def test_draws_of_terms_leave_those_of_the_batch_as_they_are_and_have_addresses_of_their_own():
    net = lively.make()
    x, _, _ = lively.inputs(net)
    key = prng.key(3, "train", 17)
    plain = objective(net, flow=TERMS["flow"](1.0)).draw(key, x)
    both = objective(net, a=Blurred(1.0, 1), flow=TERMS["flow"](1.0), b=Blurred(1.0, 2)).draw(
        key, x
    )
    for name in ("time", "noise", "drop"):
        assert_same_bits(getattr(both, name), getattr(plain, name))
    alone = objective(net, b=Blurred(1.0, 1)).draw(key, x).terms["b"]
    assert_same_bits(both.terms["b"], alone)
    later = objective(net, b=Blurred(1.0, 1)).draw(prng.key(3, "train", 18), x).terms["b"]
    times = [d["time"] for d in (both.terms["a"], both.terms["b"], later)]
    assert len({float(t[0]) for t in times}) == 3


# Tokens.


def test_the_network_is_asked_once_for_what_all_terms_need():
    net, asked = lively.make(), []

    def counting(params, *inputs, taps=()):
        asked.append(taps)
        return net(params, *inputs, taps=taps)

    terms = {"layersync": TERMS["layersync"](1.0, 1, 3), "sra2": TERMS["sra2"](1.0, 3)}
    x, _, y = lively.inputs(net)
    loss = objective(counting, **terms)
    draws = objective(net, **terms).draw(jax.random.key(0), x)
    p = loss.forward(lively.parameters(net), x, y, draws, lively.parameters(net))
    assert asked == [(1, 3)] and list(p.out.features) == [1, 3]
    terms["layersync"](p)
    assert len(asked) == 1  # the teacher is there, and nobody asked it


def test_the_teacher_gives_the_tokens_that_terms_name_and_gets_no_gradient():
    net = lively.make()
    params = lively.parameters(net)
    teacher = jax.tree.map(lambda x: 1.1 * x, params)
    x, t, y = lively.inputs(net)
    loss = objective(net, blurred=Blurred(1.0, 3))
    draws = loss.draw(jax.random.key(0), x)
    p = loss.forward(params, x, y, draws, teacher)
    found = p.teacher.tokens(p.x_t, t, y, None, (3,))
    assert list(p.out.features) == [2, 3] and list(found) == [3]
    np.testing.assert_allclose(
        found[3], net(teacher, p.x_t, t, y, taps=(3,)).features[3], rtol=1e-5, atol=1e-6
    )
    state = trained(params, loss.init(jax.random.key(1)))
    gradient = quick_jit(jax.grad(lambda w: loss(state, x, y, draws, w)[0]))(teacher)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_a_term_knows_the_step_and_the_type_of_products():
    net, seen = lively.make(), []

    class Looking(Term):
        def __call__(self, batch, head=NONE, draws=()):
            seen.append((batch.step, batch.dtype, dict(head), draws))
            return squared_error(batch.out.pred, batch.target)

    loss = replace(objective(net, looking=Looking(1.0)), dtype=jnp.bfloat16)
    x, _, y = lively.inputs(net)
    loss(lively.parameters(net), x, y, loss.draw(jax.random.key(0), x), None, 12)
    assert seen == [(12, jnp.bfloat16, {}, ())]
    exp = tiny.experiment({"model.dtype": "bfloat16"})
    assert exp.objective.dtype == exp.split_objective.dtype == jnp.bfloat16


# Heads.


def test_the_tree_that_is_trained_is_the_networks_own_where_no_term_has_a_head():
    params = {"blocks": {"a": 1}, "final_layer": 2}
    assert trained(params, {}) is params and parted(params) == (params, {})
    assert parted(trained(params, {"sra2": 3})) == (params, {"sra2": 3})
    exp = tiny.experiment()
    assert exp.abstract_terms == {} and exp.abstract_state.terms == {}


@pytest.mark.slow
def test_a_head_changes_neither_the_fresh_network_nor_another_head():
    plain, one, three = (step.init_state(tiny.experiment(c)) for c in ({}, SRA2, ALL))
    assert_same_bits(one.params, plain.params)
    assert_same_bits(three.params, plain.params)
    assert list(three.terms) == ["blurred", "sra2"]
    assert_same_bits(three.terms["sra2"], one.terms["sra2"])


def four_steps(changes, devices=1):
    """State and metrics after four steps on the first four batches."""
    exp = tiny.experiment(changes, jax.devices()[:devices])
    c = exp.config
    data = loader.batches(c.data.source, c.train.batch_size, c.seed)
    rows = [next(data) for _ in range(4)]
    stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
    batches = to_global(stacked, exp.mesh, c.train.batch_size, axis=1)
    state, found = step.make_dispatch(exp)(step.init_state(exp), batches, {})
    return jax.tree.map(np.asarray, (state, found))


MUON = {
    "optim": {
        **tiny.get_config().optim.to_dict(),
        **{"name": "muon", "momentum": 0.95, "ns_steps": 5, "ns_dtype": "float32"},
    }
}


@pytest.fixture(
    scope="module",
    params=[{}, pytest.param(MUON, marks=pytest.mark.slow)],
    ids=["adamw", "muon"],
)
def one_device(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TERMS, "blurred", Blurred)
        return request.param, four_steps({**ALL, **request.param})


@pytest.mark.slow
@pytest.mark.parametrize(
    "arrangement",
    [
        {"mesh": {"data": 2, "fsdp": 1, "tensor": 1}},
        {"mesh": {"data": 1, "fsdp": 2, "tensor": 1}, "model.remat": "dots"},
        {"mesh": {"data": 2, "fsdp": 1, "tensor": 1}, "train.accumulation": 2},
    ],
    ids=["data", "fsdp", "parts"],
)
def test_two_devices_train_heads_as_one_does(one_device, arrangement):
    optimizer, (state, found) = one_device
    state_2, found_2 = four_steps({**ALL, **optimizer, **arrangement}, devices=2)
    for name in ("loss", "loss/sra2", "loss/layersync", "loss/blurred", "grad_norm"):
        np.testing.assert_allclose(found_2[name].value, found[name].value, rtol=1e-5)
    assert_tree = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    jax.tree.map(assert_tree, state_2.trained, state.trained)


@pytest.fixture(scope="module")
def grouped():
    return four_steps({"objective.terms": {**FLOW, **HEADS}, **GROUPS})


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 1, "fsdp": 2, "tensor": 1},
        pytest.param({"data": 2, "fsdp": 1, "tensor": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_devices_train_groups_of_tokens_against_a_teacher_as_one_does(grouped, mesh):
    state, found = grouped
    changes = {"objective.terms": {**FLOW, **HEADS}, **GROUPS, "mesh": mesh, "model.remat": "dots"}
    state_2, found_2 = four_steps(changes, devices=2)
    for name in ("loss", "loss/self_alignment", "grad_norm"):
        np.testing.assert_allclose(found_2[name].value, found[name].value, rtol=1e-5, atol=1e-6)
    one, two = (m["loss_by_time/flow"] for m in (found, found_2))
    np.testing.assert_allclose(two.total, one.total, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(two.count, one.count)
    assert_tree = partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    jax.tree.map(assert_tree, state_2.trained, state.trained)


@pytest.mark.slow
def test_every_leaf_of_a_head_is_trained(one_device):
    optimizer, (state, _) = one_device
    fresh = step.init_state(tiny.experiment({**ALL, **optimizer}))
    for path, leaf in pytree.flatten(state.terms).items():
        assert not np.array_equal(leaf, pytree.flatten(fresh.terms)[path]), path


@pytest.mark.slow
def test_heads_are_split_over_devices_as_parameters_are():
    changes = {"mesh": {"data": 1, "fsdp": 2, "tensor": 1}, "model.remat": "dots"}
    state = step.init_state(tiny.experiment({**SRA2, **changes}))
    kernel = state.terms["sra2"]["fc1"]["kernel"]
    assert kernel.shape == (16, 32) and kernel.addressable_shards[0].data.shape == (8, 32)


def test_clipping_sees_the_gradient_of_network_and_heads_as_one():
    exp = tiny.experiment({**SRA2, "optim.clip_norm": 1e-3}, jax.devices()[:1])
    state = step.init_state(exp)
    sizes = {"params": 3.0, "terms": 4.0}

    def gradients(params, batch, teacher, number, frozen):
        net, terms = parted(jax.tree.map(jnp.zeros_like, params))
        net["final_layer"]["linear"]["bias"] += sizes["params"] / 2  # of 4 numbers
        terms["sra2"]["fc5"]["bias"] += sizes["terms"] / 2
        return trained(net, terms), {}

    @quick_jit
    def update(state):
        return step.update_state(
            state,
            step.Noised(None, None, None),
            gradients=gradients,
            optimizer=exp.optimizer,
            teacher_decay=0.9,
        )

    _, metrics = update(state)
    assert metrics["grad_norm"].value == pytest.approx(5.0)


# Checkpoints.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps with heads, a teacher and groups of tokens, and its last state."""
    workdir = tmp_path_factory.mktemp("run")
    changes = {"objective.terms": {**FLOW, **AND_AVERAGES}, **GROUPS, "train.steps": 12}
    return workdir, changes, trainer.run(tiny.experiment(changes), workdir).state


def copied(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "copy")


@pytest.mark.slow
def test_going_on_gives_the_bits_of_an_unbroken_run_with_a_head(run, tmp_path):
    trainer.run(tiny.experiment({**run[1], "train.steps": 6}), tmp_path)
    outcome = trainer.run(tiny.experiment(run[1]), tmp_path)
    assert outcome.state.terms.keys() == AND_AVERAGES.keys()
    assert_same_bits(outcome.state, run[2])


@pytest.mark.slow
def test_heads_are_an_item_of_their_own_and_runs_without_have_none(run):
    folder = run[0] / "checkpoints" / "12"
    assert {"params", "opt_state", "ema", "terms", "ema_terms", "meta"} <= {
        p.name for p in folder.iterdir()
    }
    shapes = jax.tree.map(lambda x: x.shape, Checkpoints(run[0], reading=True).param_shapes(12))
    plain = tiny.experiment().abstract_params
    assert shapes == jax.tree.map(lambda x: x.shape, plain)
    assert not list((tiny.trained().workdir / "checkpoints").glob("*/*terms"))


@pytest.mark.slow
def test_parameters_and_losses_of_heads_are_written_down(run):
    assert "terms/sra2/fc5/kernel" in (run[0] / "parameters.txt").read_text()
    line = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == pytest.approx(
        line["loss/flow"]
        + 0.5 * (line["loss/internal_guidance"] + line["loss/self_alignment"])
        + line["loss/sra2"]
        + 0.1 * line["loss/contrastive"]
    )


@pytest.mark.slow
def test_sampling_and_export_need_no_head_and_show_none(run, tmp_path):
    workdir = copied(run, tmp_path)
    modes.run(tiny.settings(run[1]), workdir=str(run[0]), mode="sample")
    for item in ("terms", "ema_terms", "opt_state"):
        shutil.rmtree(workdir / "checkpoints" / "12" / item)
    modes.run(tiny.settings(run[1]), workdir=str(workdir), mode="sample")
    found = [sorted((w / "samples").rglob("samples.npz"))[0] for w in (run[0], workdir)]
    images = [np.load(file)["arr_0"] for file in found]
    np.testing.assert_array_equal(images[0], images[1])
    written = []
    for name, folder in (("with", workdir), ("without", tiny.trained().workdir)):
        file = tmp_path / f"{name}.safetensors"
        export_checkpoint.export_checkpoint(folder, file, "raw")
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        written.append(header.keys())
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.parametrize("item", ["terms", pytest.param("ema_terms", marks=pytest.mark.slow)])
def test_a_checkpoint_that_lost_its_heads_is_left_out_when_training_goes_on(
    run, tmp_path, capsys, item
):
    workdir = copied(run, tmp_path)
    shutil.rmtree(workdir / "checkpoints" / "12" / item)
    outcome = trainer.run(tiny.experiment(run[1]), workdir)
    assert f"12 cannot be read ({item}/" in capsys.readouterr().out
    assert_same_bits(outcome.state, run[2])


def test_an_imported_optimizers_state_is_refused_where_a_term_trains_a_head(tmp_path):
    exp = tiny.experiment(devices=jax.devices()[:1])
    state = step.init_state(exp)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"examples": 0}, exp.config.raw, "state")
    checkpoints.wait()
    checkpoints.close()
    with pytest.raises(CheckpointError, match="train heads of sra2, but .* covers none"):
        trainer.Trainer(tiny.experiment(SRA2), tmp_path)


@pytest.mark.slow
def test_imported_weights_are_trained_on_with_a_fresh_head(tmp_path):
    exp = tiny.experiment(devices=jax.devices()[:1])
    weights = jax.tree.map(lambda x: x + 1, step.init_state(exp).params)
    checkpoints = Checkpoints(tmp_path)
    imported = TrainState(jnp.int32(0), weights, opt_state=None, ema=None)
    checkpoints.save(imported, {"examples": 0}, exp.config.raw, "weights")
    checkpoints.wait()
    checkpoints.close()
    state = trainer.Trainer(tiny.experiment(SRA2), tmp_path).state
    assert_same_bits(state.params, weights)
    assert_same_bits(state.terms, step.init_state(tiny.experiment(SRA2)).terms)


# What looks at a run.


@pytest.mark.slow
def test_replay_computes_a_step_with_heads():
    exp = tiny.experiment(ALL, jax.devices()[:1])
    batch = next(loader.batches(exp.config.data.source, 16, 0))
    found = replay._look(exp, step.init_state(exp), batch)
    assert found.startswith("every operation of it gives numbers here")


@pytest.mark.slow
def test_a_dry_run_lists_heads_and_their_bytes():
    text, plain = dry_run.describe(tiny.experiment(SRA2)), dry_run.describe(tiny.experiment())
    head = pytree.count(tiny.experiment(SRA2).abstract_terms)
    [line] = [line for line in text.splitlines() if line.startswith("terms.sra2")]
    assert line.split()[1] == f"{head:,}" and "terms" not in plain
    totals = [
        int(line.split()[1].replace(",", ""))
        for shown in (text, plain)
        for line in shown.splitlines()
        if line.startswith("total")
    ]
    assert totals[0] - totals[1] == head and "loss/sra2" in text
