"""--mode=import --training_state: training goes on as PyTorch would have gone on.

The files are written as the published trainers write them: key order and buffers from the lists of
tests/golden/keys, parameters numbered as torch.optim numbers them. What PyTorch does next is
written out in NumPy.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import lively
import numpy as np
import optax
import pytest
from published_networks import config_of, dit, sit
from published_optimizers import (
    ADAMW,
    MATRICES,
    UPDATES,
    VECTORS,
    adamw_state,
    drawn,
    muon_state,
    published_order,
    squares,
    tensors,
)
from safetensors.numpy import load_file, save_file
from torch_pickles import tensor, write

from configs import published
from ig_jax import experiment, modes, pytree
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.interop import optimizer_state, parameter_names
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.programs import export_checkpoint, import_checkpoint
from ig_jax.training.trainer import Trainer


def lightningdit():
    """A lively LightningDiT with one readout, and its state dict with the tables of its RoPE."""
    sizes = {"depth": 3, "hidden_size": 16, "num_heads": 2, "patch_size": 1, "mlp_ratio": 4.0}
    options = {"swiglu": True, "rope": True, "rms_norm": True, "shift": True, "qk_norm": False}
    rest = {"time_scale": 1.0, "dtype": "float32", "remat": "none", "unroll": 1}
    net = Network(
        LightningDiT, LightningDiTSettings(**sizes, **options, **rest, readouts=(2,)), 4, 5, 7
    )
    state = parameter_names.to_published(lively.parameters(net))
    return net, state | parameter_names.rotary_tables(4, 8)


@pytest.fixture(scope="module")
def adamw_file(tmp_path_factory):
    """A file of REPA's kind, with a projector amid the network; and what is in it."""
    folder = tmp_path_factory.mktemp("adamw")
    net, _, state = sit()
    raw = published_order(state, "ig_sit_b2")
    before = list(raw).index("final_layer_xr.linear.weight")
    projector = ("projectors.0.0.weight", np.ones((4, 24), np.float32))
    raw = dict([*list(raw.items())[:before], projector, *list(raw.items())[before:]])
    average, first = drawn(raw, 1, 0.2), drawn(raw, 2, 1e-3)
    second = squares(drawn(raw, 3, 1e-3))
    opt = adamw_state(raw, first, second)
    content = {"model": tensors(raw), "ema": tensors(average), "opt": opt, "steps": 1234}
    write(folder / "step-1234.pt", content)
    path = import_checkpoint.import_checkpoint(
        *(folder / "step-1234.pt", folder / "run", published.bases()),
        readout_depth=2,
        training_state=True,
    )
    return SimpleNamespace(
        net=net, folder=folder, content=content, path=path, raw=raw, average=average,
        first=first, second=second,
    )  # fmt: skip


@pytest.fixture(scope="module")
def muon_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon")
    net, state = lightningdit()
    raw = published_order(state, "ig_lightningdit_xl1")
    assert raw.keys() == state.keys()
    average, momentum, first = (drawn(raw, seed, 1e-2) for seed in (1, 2, 3))
    second = squares(drawn(raw, 4, 1e-2))
    opt = muon_state(raw, momentum, first, second)
    write(folder / "0001234.pt", {"model": tensors(raw), "ema": tensors(average), "opt": opt})
    path = import_checkpoint.import_checkpoint(
        *(folder / "0001234.pt", folder / "run", published.bases()),
        readout_depth=2,
        training_state=True,
    )
    return SimpleNamespace(
        net=net, folder=folder, path=path, raw=raw, average=average, opt=opt,
        momentum=momentum, first=first, second=second,
    )  # fmt: skip


def start(file, **changes):
    """The experiment of the imported run, with settings changed, and its state of step 0."""
    c = config_of(file.path)
    c.optim.update(changes)
    c.train.ema_decays = (0.99, 0.9)  # another run's
    exp = experiment.experiment(run_config.parse(c, jax.device_count()))
    trainer = Trainer(exp, file.folder / "run")
    trainer.close()
    return exp, trainer.state


def step(exp, state, gradients: dict) -> dict:
    """The parameters after one update of ours with these gradients, under published names."""

    @lively.compile_quickly
    def update(grads, opt_state, params):
        updates, _ = exp.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates)

    grads = parameter_names.from_published(gradients, exp.abstract_params)
    return parameter_names.to_published(
        jax.device_get(update(grads, state.opt_state, state.params))
    )


def of_network(state: dict) -> dict:
    return {n: a for n, a in state.items() if not n.startswith("projectors") and "rope" not in n}


def adamw_step(p, g, m, v, *, lr, betas, eps, weight_decay, **_):
    """PyTorch's AdamW at its next step, in float64."""
    p, g, m, v = (np.asarray(x, np.float64) for x in (p, g, m, v))
    (b1, b2), t = betas, UPDATES + 1
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    moved = (m / (1 - b1**t)) / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps)
    return p * (1 - lr * weight_decay) - lr * moved


def muon_step(p, g, m, *, lr, momentum, weight_decay, ns_steps, **_):
    """The published Muon at its next step, in float64."""
    p, g, m = (np.asarray(x, np.float64) for x in (p, g, m))
    average = momentum * m + (1 - momentum) * g
    matrix = (momentum * average + (1 - momentum) * g).reshape(len(g), -1)
    rows, cols = matrix.shape
    x = matrix.T if rows > cols else matrix
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(ns_steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = (x.T if rows > cols else x) * np.sqrt(max(1, rows / cols))
    moved = 0.2 * np.sqrt(max(p.shape[:2])) * x.reshape(p.shape)
    return p * (1 - lr * weight_decay) - lr * moved


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# What comes next


def test_the_next_update_is_that_of_pytorchs_adamw_for_every_parameter(adamw_file):
    f = adamw_file
    exp, state = start(f)
    raw, gradients = of_network(f.raw), of_network(drawn(f.raw, 5, 1e-3))
    found = step(exp, state, gradients)
    assert found.keys() == raw.keys()
    for name, p in raw.items():
        expected = adamw_step(p, gradients[name], f.first[name], f.second[name], **ADAMW)
        if name == "pos_embed":
            expected = p
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-7, err_msg=name)


def test_a_momentum_is_at_its_parameter_even_where_shapes_are_equal(muon_file):
    _, state = start(muon_file)
    held = pytree.flatten(optax.tree.get(state.opt_state, "momentum"))
    arrays = {p: np.asarray(a) for p, a in held.items() if not isinstance(a, optax.MaskedNode)}
    matrices = {n: a for n, a in of_network(muon_file.momentum).items() if a.ndim >= 2}
    del matrices["pos_embed"]
    same(parameter_names.to_published(pytree.unflatten(arrays)), matrices)
    shapes = [array.shape for array in matrices.values()]
    assert len(set(shapes)) < len(shapes) / 2


@pytest.mark.slow
def test_the_next_update_is_that_of_the_published_muon_for_every_parameter(muon_file):
    f = muon_file
    exp, state = start(f, ns_dtype="float32")
    raw, gradients = of_network(f.raw), of_network(drawn(f.raw, 5, 1e-3))
    found = step(exp, state, gradients)
    assert found.keys() == raw.keys()
    for name, p in raw.items():
        if p.ndim >= 2:
            expected = muon_step(p, gradients[name], f.momentum[name], **MATRICES)
        else:
            expected = adamw_step(p, gradients[name], f.first[name], f.second[name], **VECTORS)
        if name == "pos_embed":
            expected = p
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["adamw_file", "muon_file"])
def test_the_config_has_the_optimizer_of_the_file(kind, request):
    optimizer = config_of(request.getfixturevalue(kind).path).optim.to_dict()
    told = {"learning_rate": 1e-2, "b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    rest = {"clip_norm": 1.0, "warmup_steps": 0, "schedule": "constant"}
    newton_schulz = {"momentum": 0.9, "ns_steps": 5, "ns_dtype": "bfloat16"}
    muon = {"name": "muon", "vector_weight_decay": 0.05, **newton_schulz}
    more = {"adamw_file": {"name": "adamw"}, "muon_file": muon}
    assert optimizer == told | rest | more[kind]


def test_every_average_of_the_run_starts_from_that_of_the_file(adamw_file):
    _, state = start(adamw_file)
    assert list(state.ema) == ["0.99", "0.9"]
    for average in state.ema.values():
        same(parameter_names.to_published(jax.device_get(average)), of_network(adamw_file.average))
    same(parameter_names.to_published(jax.device_get(state.params)), of_network(adamw_file.raw))


def test_counting_goes_on_for_adamw_and_begins_for_the_run_and_its_schedule(adamw_file):
    _, state = start(adamw_file, schedule="linear", warmup_steps=3, learning_rate=1.0)
    counts = [int(count) for _, count in optax.tree.get_all_with_path(state.opt_state, "count")]
    assert sorted(counts) == [0, UPDATES] and int(state.step) == 0


# The programs


@pytest.mark.slow
def test_the_length_of_the_published_run_is_told(adamw_file, muon_file, tmp_path, capsys):
    def told(file: Path) -> str:
        import_checkpoint.import_checkpoint(
            *(file, tmp_path / file.stem, published.bases()), readout_depth=2, training_state=True
        )
        return capsys.readouterr().out

    assert "trained for 1,234 steps; adamw goes on after 7" in told(
        adamw_file.folder / "step-1234.pt"
    )
    assert "trained for 1,234 steps; muon goes on after 7" in told(muon_file.folder / "0001234.pt")
    other = tmp_path / "other.pt"
    other.write_bytes((muon_file.folder / "0001234.pt").read_bytes())
    assert "trained for 7 steps" in told(other)


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_raw_and_averaged_weights_of_an_imported_state_are_told_apart(adamw_file, tmp_path, which):
    export_checkpoint.export_checkpoint(
        adamw_file.folder / "run", tmp_path / "back.safetensors", which
    )
    raw, expected = adamw_file.raw, adamw_file.average
    # What training alone uses comes back with the weights that the file was imported for.
    same(load_file(tmp_path / "back.safetensors"), expected if which == "ema" else of_network(raw))


@pytest.mark.slow
def test_sampling_reads_the_averages_or_the_raw_weights(adamw_file, tmp_path):
    """As from files that hold only the one or the other."""

    def samples(weights: str, state: dict) -> np.ndarray:
        workdir = tmp_path / weights
        save_file(of_network(state), tmp_path / f"{weights}.safetensors")
        alone = tmp_path / f"{weights}.safetensors"
        import_checkpoint.import_checkpoint(alone, workdir, published.bases(), readout_depth=2)
        c = config_of(adamw_file.path)
        c.sample.num, c.sample.batch_size, c.sample.sampler.num_steps = 2, 2, 2
        c.sample.weights = weights
        arrays = []
        for folder in (adamw_file.folder / "run", workdir):
            target = modes.run(c, workdir=str(folder), mode="sample")
            with np.load(target / "samples.npz") as file:
                arrays.append(file["arr_0"])
        np.testing.assert_array_equal(*arrays)
        return arrays[0]

    average, raw = samples("ema", adamw_file.average), samples("raw", adamw_file.raw)
    assert np.any(average != raw)


@pytest.mark.slow
def test_an_imported_state_is_trained_on(adamw_file, tmp_path):
    workdir = tmp_path / "run"
    path = import_checkpoint.import_checkpoint(
        *(adamw_file.folder / "step-1234.pt", workdir, published.bases()),
        readout_depth=2,
        training_state=True,
    )
    c = config_of(path)
    c.train.update({"steps": 2, "epochs": 0.0, "batch_size": 4})
    c.optim.learning_rate = 1e-6
    c.log.samples_every_steps = 0
    outcome = modes.run(c, workdir=str(workdir))
    assert outcome.step == 2
    counts = {int(x) for _, x in optax.tree.get_all_with_path(outcome.state.opt_state, "count")}
    assert counts == {2, UPDATES + 2}
    checkpoints = checkpoint_manager.of_run(workdir, "--workdir")
    assert {k: checkpoints.imported(k) for k in checkpoints.all_steps()} == {0: "state", 2: ""}
    checkpoints.close()
    export_checkpoint.export_checkpoint(workdir, tmp_path / "trained.safetensors", "raw")
    trained = load_file(tmp_path / "trained.safetensors")
    moved = max(np.abs(trained[n] - a).max() for n, a in of_network(adamw_file.raw).items())
    assert 0 < moved < 1e-5


@pytest.mark.parametrize("written, meant", [(True, "weights"), (False, ""), ("state", "state")])
def test_older_checkpoints_say_whether_they_are_imported(tmp_path, written, meant):
    checkpoints = checkpoint_manager.Checkpoints(tmp_path)
    file = tmp_path / "checkpoints" / "0" / "meta" / "metadata"
    file.parent.mkdir(parents=True)
    config = {"train": {"ema_decays": [0.9]}}
    meta = {"step": 0, "data": {"examples": 0}, "config": config, "versions": {}}
    file.write_text(json.dumps(meta | {"imported": written}))
    assert checkpoints.imported(0) == meant
    checkpoints.close()


# What is refused


def test_another_optimizer_than_that_of_the_state_is_refused(adamw_file, muon_file):
    free = {"learning_rate": 1.0, "weight_decay": 0.0, "schedule": "cosine", "warmup_steps": 9}
    start(adamw_file, **free)
    with pytest.raises(UserError, match="b1: 0.8 there, 0.5 here.*without --training_state"):
        start(adamw_file, b1=0.5)
    c = config_of(muon_file.path)
    c.optim = config_of(adamw_file.path).optim
    with pytest.raises(UserError, match="optim.name: 'muon' there, 'adamw' here"):
        modes.run(c, workdir=str(muon_file.folder / "run"))


def refusal(file: Path, workdir: Path, **told) -> str:
    with pytest.raises(UserError) as caught:
        import_checkpoint.import_checkpoint(
            file, workdir, published.bases(), training_state=True, **told
        )
    message = str(caught.value)
    assert str(file) in message and "\n" not in message and not workdir.exists()
    return message


def test_a_file_without_the_parts_of_training_is_refused(adamw_file, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file(of_network(adamw_file.raw), weights)
    write(tmp_path / "bare.pt", adamw_file.content["ema"])
    for file in (weights, tmp_path / "bare.pt"):
        says = refusal(file, tmp_path / "run", readout_depth=2)
        assert "holds no 'model', 'ema', 'opt'" in says and "without --training_state" in says
    for lacking in ("model", "opt"):
        content = {key: part for key, part in adamw_file.content.items() if key != lacking}
        file = write(tmp_path / "lacking.pt", content)
        assert f"holds no '{lacking}', so" in refusal(file, tmp_path / "run", readout_depth=2)
    assert "no such file" in refusal(tmp_path / "nowhere.pt", tmp_path / "run")


def test_a_network_whose_weights_are_converted_is_refused(tmp_path):
    parts = tensors(dit()[2])
    file = write(tmp_path / "official.pt", {"model": parts, "ema": parts, "opt": {"state": {}}})
    assert "moments of its optimizer cannot be" in refusal(file, tmp_path / "run", family="sit")


def test_all_that_does_not_fit_is_listed(adamw_file, tmp_path):
    content = adamw_file.content
    numbers = list(content["opt"]["state"])
    entries = {n: dict(e) for n, e in content["opt"]["state"].items() if n != numbers[0]}
    entries[numbers[1]]["exp_avg_sq"] = tensor(np.zeros(3, np.float32))
    renamed = {"final_layer.linear.bias": "other.bias"}
    raw = {renamed.get(name, name): array for name, array in content["model"].items()}
    opt = {**content["opt"], "state": entries}
    file = write(tmp_path / "other.pt", {**content, "model": raw, "opt": opt})
    says = refusal(file, tmp_path / "run", readout_depth=2)
    parts = re.findall(r"(model|exp_avg|exp_avg_sq): (.*?)(?=; exp_avg|$)", says)
    assert [name for name, _ in parts] == ["model", "exp_avg", "exp_avg_sq"]
    for name, told in parts:
        assert "lacks 'final_layer.linear.bias'" in told and "model lacks: other.bias" in told
        assert ("lacks 'x_embedder.proj.weight'" in told) == (name != "model")
        assert ("'x_embedder.proj.bias' has 3 values" in told) == (name == "exp_avg_sq")


def broken(opt: dict, **group) -> dict:
    return {**opt, "param_groups": [{**opt["param_groups"][0], **group}, *opt["param_groups"][1:]]}


def with_entry(opt: dict, number: int, **entry) -> dict:
    return {**opt, "state": {**opt["state"], number: {**opt["state"][number], **entry}}}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda opt: [], "'opt' holds no state of an optimizer"),
        (lambda opt: {**opt, "state": {}}, "'opt' holds no state of an optimizer"),
        (lambda opt: broken(opt, params=[0, 1]), "group 0 has 2 parameters, not "),
        (lambda opt: with_entry(opt, 2, step=9), "should be the same for all, but are 7, 9"),
        (lambda opt: with_entry(opt, 2, max_exp_avg_sq=0), "it keeps max_exp_avg_sq, which no"),
        (
            lambda opt: {**opt, "param_groups": [*opt["param_groups"]] * 2},
            "has 2 groups of parameters: it is neither",
        ),
        (
            lambda opt: {**opt, "param_groups": [{"params": opt["param_groups"][0]["params"]}]},
            "a group of the optimizer lacks 'betas'",
        ),
    ],
)
def test_an_adamw_of_another_kind_is_refused(adamw_file, tmp_path, change, says):
    content = {**adamw_file.content, "opt": change(adamw_file.content["opt"])}
    file = write(tmp_path / "broken.pt", content)
    assert says in refusal(file, tmp_path / "run", readout_depth=2)


def test_a_muon_whose_vectors_have_a_learning_rate_of_their_own_is_refused(muon_file):
    groups = muon_file.opt["param_groups"]
    opt = {"state": {0: {}}, "param_groups": [groups[0], {**groups[1], "lr": 1.0}]}
    with pytest.raises(ValueError, match="here they have 0.01, as the matrices"):
        optimizer_state.read(opt, muon_file.raw)


def test_the_flag_reaches_the_import(adamw_file, tmp_path):
    modes.import_file(
        *(str(adamw_file.folder / "step-1234.pt"), str(tmp_path / "run"), published.bases()),
        readout_depth=2,
        family="",
        training_state=True,
    )
    checkpoints = checkpoint_manager.of_run(tmp_path / "run", "--workdir")
    assert checkpoints.imported(0) == "state"
    checkpoints.close()
