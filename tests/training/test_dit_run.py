"""The DiT of the digits at toy size: its losses are logged and fall, and steps sample it."""

import jax
import numpy as np
import pytest

from configs import digits
from ig_jax import modes
from ig_jax.monitoring.metric_writer import read_metrics

pytestmark = pytest.mark.slow


def config():
    c = digits.get_config("dit")
    c.model.update({"depth": 3, "hidden_size": 32, "num_heads": 2, "unroll": 1})
    c.train.update({"steps": 60, "batch_size": 16})
    c.optim.warmup_steps = 5
    c.checkpoint.every_steps = 60
    c.log.update({"every_steps": 20, "samples_every_steps": 60})
    c.sample.update({"num": 12, "batch_size": 8 * jax.device_count()})
    c.sample.sampler.num_steps = 4
    return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    assert modes.run(config(), workdir=str(folder)).step == 60
    return folder


def test_both_losses_are_logged_by_time_as_well_and_fall(workdir):
    first, *_, last = read_metrics(workdir)
    for name in ("loss/flow", "loss/variational_bound", "loss/internal_guidance"):
        assert last[name] < first[name]
    terms = config().objective.terms
    total = sum(terms[name].weight * last[f"loss/{name}"] for name in terms)
    assert last["loss"] == pytest.approx(total, rel=1e-5)
    assert any(name.startswith("loss_by_time/variational_bound/") for name in last)
    assert list((workdir / "previews").iterdir())


def test_it_is_sampled_by_ancestral_steps_into_a_folder_that_says_so(workdir):
    target = modes.run(config(), workdir=str(workdir), mode="sample")
    assert "-ancestral4-ig2-cfg1.2" in target.name
    with np.load(target / "samples.npz") as file:
        assert file["arr_0"].shape == (12, 8, 8, 1) and np.ptp(file["arr_0"]) > 0
