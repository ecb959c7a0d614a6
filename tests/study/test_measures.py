"""Measures of trained runs: which there are, the loss on held-out data, what training took."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import studies
import tiny

from ig_jax.config.studies import LinearProbe
from ig_jax.errors import UserError
from ig_jax.study import measures
from ig_jax.training.held_out_loss import PASSES, HeldOutLoss

PROBE = LinearProbe((2, 1), 0.25)


@pytest.fixture
def evaluator(monkeypatch):
    """One that knows two measures, and takes no time to make."""
    names = ("decode", "extract", "rows", "compute", "record")
    stub = SimpleNamespace(
        metrics=("fd", "recall"), shows_readout=False, **dict.fromkeys(names, repr)
    )
    monkeypatch.setattr(measures, "make_evaluator", lambda config, mesh: (stub, None))


def bench(*names, probe=PROBE):
    return measures.Bench(studies.experiment(studies.settings()), names, probe)


def test_an_unknown_measure_is_told_with_the_known_ones(evaluator):
    with pytest.raises(UserError, match="^measure 'fidd': must be one of fd, recall, loss, probe$"):
        bench("loss", "fidd")


def test_a_probe_without_blocks_is_refused(evaluator):
    with pytest.raises(UserError, match=r"^study.probe.blocks = \(\): name the blocks"):
        bench("probe", probe=LinearProbe((), 0.1))


def test_a_probe_is_a_measure_for_each_block(evaluator):
    assert bench("recall", "probe", "loss").names == [
        *("recall", "probe_2_0.25", "probe_1_0.25", "loss")
    ]


def test_what_needs_no_samples_makes_no_evaluator(monkeypatch):
    monkeypatch.setattr(measures, "make_evaluator", lambda *a: pytest.fail("made one"))
    assert bench("loss").floor == {}


def test_training_costs_its_gradients_and_the_median_step(tmp_path):
    lines = [{"step": i, "seconds/step": s} for i, s in ((4, 0.5), (8, 9.0), (12, 0.25))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    exp = studies.experiment(studies.settings())
    found = measures.cost(exp, tmp_path)
    assert found["train_seconds"] == 8 * 0.5
    assert found["train_flops"] == 8 * exp.gradient_flops(16)


@pytest.mark.slow
def test_a_held_out_loss_of_a_network_that_predicts_nothing_is_that_of_the_target():
    """With output 0 the loss is the mean square of noise - x_0: 1 + E x_0^2 for all times."""
    exp = tiny.experiment({"sample.batch_size": 100}, jax.devices()[:1])
    params = jax.tree.map(np.zeros_like, jax.jit(exp.net.init)(jax.random.key(0)))
    held_out = exp.config.data.source.held_out()
    pixels = held_out.batch(np.arange(len(held_out)))["stored"] / 127.5 - 1
    loss = HeldOutLoss(exp)
    found = loss(params, 7)
    n = PASSES * pixels.size
    # Four standard errors, of squares whose standard deviation is below 4.
    assert abs(found - 1 - np.mean(pixels**2)) < 4 * 4 / np.sqrt(n)
    assert loss(params, 7) == found and loss(params, 8) != found
