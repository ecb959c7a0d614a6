"""SRA's alignment head: in from a published file, trained on, and out again."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from published_networks import config_of
from published_optimizers import ADAMW, adamw_state, drawn, published_order, squares, tensors
from published_variants import CLASSES, HEADS, WIDTH, sit
from safetensors.numpy import load_file, save_file
from torch_pickles import write

from configs import published
from ig_jax import experiment, modes
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.interop import declared
from ig_jax.interop.detect import detect
from ig_jax.programs import export_checkpoint, import_checkpoint
from ig_jax.training.trainer import Trainer

RNG = np.random.default_rng(7)
SHAPES = {
    "ap_head.linear1.weight": (2 * WIDTH, WIDTH),
    "ap_head.linear1.bias": (2 * WIDTH,),
    "ap_head.linear2.weight": (WIDTH, 2 * WIDTH),
    "ap_head.linear2.bias": (WIDTH,),
}
HEAD = {n: RNG.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}
TERM = "self_alignment"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A published training file of SRA's SiT: raw and averaged weights, AdamW's state."""
    folder = tmp_path_factory.mktemp("sra")
    raw = published_order(sit(extra=HEAD)[0], "sra_sit_xl2")
    average, first = drawn(raw, 1, 0.2), drawn(raw, 2, 1e-3)
    second = squares(drawn(raw, 3, 1e-3))
    opt = adamw_state(raw, first, second)
    content = {"model": tensors(raw), "ema": tensors(average), "opt": opt, "steps": 77}
    write(folder / "0000077.pt", content)
    return SimpleNamespace(
        path=folder / "0000077.pt", raw=raw, average=average, first=first, second=second
    )


def imported(file, workdir, **flags):
    path = import_checkpoint.import_checkpoint(
        *(file.path, workdir, published.bases()), num_heads=HEADS, **flags
    )
    c = config_of(path)
    c.train.update({"steps": 2, "epochs": 0.0, "batch_size": 4})
    c.log.samples_every_steps = 0
    return c


def head_of(state) -> dict:
    """A state's head under published names."""
    head = {"terms": jax.device_get(state.terms)}
    return export_checkpoint.parameter_names.to_published(head)


def assert_same(ours: dict, reference: dict) -> None:
    assert ours.keys() == SHAPES.keys()
    for name in SHAPES:
        np.testing.assert_array_equal(ours[name], reference[name], err_msg=name)


def begun(c, workdir):
    exp = experiment.experiment(run_config.parse(c, jax.device_count()))
    trainer = Trainer(exp, workdir)
    trainer.close()
    return exp, trainer.state


def exported(workdir, weights="ema") -> dict:
    export_checkpoint.export_checkpoint(workdir, workdir / "out.safetensors", weights)
    return load_file(workdir / "out.safetensors")


def test_weights_come_with_the_head_beside_them_and_go_out_as_they_came(file, tmp_path, capsys):
    c = imported(file, tmp_path / "run")
    note = "block 1 against block 2 of the average: the file does not say which"
    assert note in " ".join(capsys.readouterr().out.split())
    assert c.objective.terms.self_alignment.weight == 0.5
    _, state = begun(c, tmp_path / "run")
    assert_same(head_of(state), file.average)
    state = exported(tmp_path / "run")
    assert state.keys() == file.average.keys()
    for name, array in file.average.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


@pytest.mark.slow
def test_training_goes_on_from_the_file_s_head_with_its_moments_as_pytorch_would(file, tmp_path):
    """One update of the head with made-up gradients, AdamW written out in float64."""
    exp, state = begun(imported(file, tmp_path / "run", training_state=True), tmp_path / "run")
    assert_same(head_of(state), file.raw)
    gradients = drawn(file.raw, 5, 1e-3)
    names = export_checkpoint.parameter_names
    grads = names.from_published(gradients, jax.eval_shape(lambda: state.trained))
    updates, _ = jax.jit(exp.optimizer.update)(grads, state.opt_state, state.trained)
    ours = names.to_published({"terms": jax.device_get(updates["terms"])})
    (b1, b2), t = ADAMW["betas"], 8
    for name in SHAPES:
        g, m, v = (np.float64(x[name]) for x in (gradients, file.first, file.second))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        moved = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + ADAMW["eps"])
        expected = -ADAMW["lr"] * (moved + ADAMW["weight_decay"] * np.float64(file.raw[name]))
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=2e-7, err_msg=name)


@pytest.mark.slow
def test_a_trained_head_goes_out_and_comes_in_again(file, tmp_path):
    outcome = modes.run(imported(file, tmp_path / "run"), workdir=str(tmp_path / "run"))
    trained = head_of(outcome.state)
    assert all(np.any(trained[name] != file.average[name]) for name in SHAPES)
    state = exported(tmp_path / "run")
    assert_same({n: state[n] for n in SHAPES}, trained)
    assert "SiT of SRA" in (tmp_path / "run" / "out.md").read_text()
    again = SimpleNamespace(path=tmp_path / "run" / "out.safetensors")
    _, state = begun(imported(again, tmp_path / "again"), tmp_path / "again")
    assert_same(head_of(state), trained)


@pytest.mark.slow
def test_a_run_without_the_term_leaves_the_head_out(file, tmp_path):
    c = imported(file, tmp_path / "weights")
    del c.objective.terms.self_alignment
    _, state = begun(c, tmp_path / "weights")
    assert not state.terms
    c = imported(file, tmp_path / "state", training_state=True)
    del c.objective.terms.self_alignment
    with pytest.raises(UserError, match="train heads of none, but .* covers self_alignment"):
        begun(c, tmp_path / "state")


@pytest.mark.parametrize("odd", ["missing", "narrow", "whole numbers"])
def test_a_head_that_is_not_sras_is_left_out_and_said(odd):
    head = dict(HEAD)
    if odd == "missing":
        del head["ap_head.linear2.bias"]
    else:
        head["ap_head.linear1.bias"] = (
            np.zeros(WIDTH, np.float32) if odd == "narrow" else np.zeros(2 * WIDTH, np.int8)
        )
    network = detect(sit(extra=head)[0], declared.Declared(num_heads=HEADS))
    assert not network.alignment_head
    assert network.notes[0] == "left out, needed in training only: ap_head"
    whole = detect(sit(extra=HEAD)[0], declared.Declared(num_heads=HEADS))
    assert whole.alignment_head.keys() == SHAPES.keys() and "left out" not in whole.notes[0]


def test_a_published_dit_of_sra_gets_its_own_weight_and_distance(tmp_path):
    save_file(sit(sigma=True, extra=HEAD)[0], tmp_path / "dit.safetensors")
    c = imported(SimpleNamespace(path=tmp_path / "dit.safetensors"), tmp_path / "run")
    term = c.objective.terms.self_alignment
    assert (term.weight, term.distance, term.beta) == (0.04, "smooth_l1", 0.05)
    assert c.data.source.num_classes == CLASSES
