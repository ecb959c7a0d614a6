"""The benchmarks of speed run, and count right; how fast anything is, no test says."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from places import ROOT

from benchmarks import (
    evaluate,
    gpu_aot,
    measuring,
    roofline,
    sample,
    torch_network,
    torch_peer,
    train,
)
from ig_jax import pytree
from ig_jax.codecs import kl_names
from ig_jax.errors import UserError
from ig_jax.monitoring import flops
from ig_jax.objectives.base import Draws

QUICK = ["--config=tests/helpers/tiny.py", "--calls=1", "--windows=2"]
MODULES = {"train": train, "sample": sample, "torch_peer": torch_peer}
needs_torch = pytest.mark.skipif(torch_peer.torch is None, reason="PyTorch is not installed")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """`run(benchmark, *flags)` -> (what it printed, its record)."""

    def call(name: str, *flags: str) -> tuple[str, dict]:
        file = tmp_path / "record.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *QUICK, *flags, f"--json={file}"])
        MODULES[name].main()
        return capsys.readouterr().out, json.loads(file.read_text())

    return call


def of_image() -> int:
    exp = tiny.experiment()
    return flops.forward(exp.net, exp.abstract_params)


@pytest.mark.slow
def test_a_training_record_follows_from_its_seconds(run):
    printed, found = run("train", "--batch=8")
    seconds = found["seconds_per_step"]
    assert seconds["least"] <= seconds["median"] <= seconds["most"]
    assert found["images_per_second"] * seconds["median"] == pytest.approx(8)
    rate = 3 * 8 * of_image() / seconds["median"] / jax.device_count()
    assert found["model_tflops_per_device"] * 1e12 == pytest.approx(rate)
    assert found["mfu"] is None  # a CPU's peak is not known
    assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert found["versions"]["jax"] == jax.__version__ and found["device"] == "cpu"
    names = ["latents and noise", "forward alone", "forward and backward", "optimizer and averages"]
    assert list(found["parts"]) == names
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if "|" in line]
    assert rows == ["images", "------", "8", "part", "-" * 22, *names, "sum without forward"]


@pytest.mark.slow
def test_the_forward_part_computes_no_gradients():
    """By XLA's count, of a program that is not compiled for a loop: depth 2 unrolled."""
    exp = measuring.load(
        "tests/helpers/tiny.py", {"model.unroll": 2, "train.batch_size": 8}, devices=1
    )
    state, batches = train.abstract(exp)
    batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batches.items()}
    drawn = jax.eval_shape(train.noised(exp), state.step, batch, {})
    given = state.params, drawn, state.params
    both, forward = (
        jax.jit(part(exp)).lower(*given).compile().cost_analysis()["flops"]
        for part in (train.gradients, train.forward)
    )
    assert 0.2 * both < forward < 0.45 * both


@pytest.mark.slow
def test_flops_counted_twice_agree(run):
    printed, found = run("train", "--compile_only", "--hidden_size=256", "--batch=2", "--devices=1")
    xla, paper = found["gradient_gflop_an_image"].values()
    assert 0.97 < xla / paper < 1.03
    assert found["memory_gib"]["arguments"] > 0 and "| gradient gflop an image |" in printed


def test_memory_that_is_updated_in_place_is_planned_once():
    x = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    kept = measuring.built(jax.jit(lambda x: x + 1), x).program
    donated = measuring.built(jax.jit(lambda x: x + 1, donate_argnums=0), x).program
    assert measuring.planned_gib(kept) == pytest.approx(8 / 1024, rel=0.01)
    assert measuring.planned_gib(donated) == pytest.approx(4 / 1024, rel=0.01)


def test_what_a_first_call_does_besides_is_not_timed(monkeypatch):
    clock = iter([10.0, 16.0, 20.0, 24.0, 30.0, 32.0])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    made = []
    found = measuring.seconds(lambda: made.append(0) or jnp.zeros(()), calls=2, windows=3)
    assert found == (2.0, 1.0, 3.0) and found.spread == "100.0%"
    assert len(made) == 1 + 2 * 3


@pytest.mark.slow
def test_a_sampling_record_follows_from_its_evaluations(run):
    printed, found = run("sample", "--batch=4", "--steps=5", "--peak_tflops=0.5")
    rows = found["settings"]
    counts = {name: each["evaluations"] for name, each in rows.items()}
    assert counts == {
        **{"none": 5, "IG": 5, "CFG on its interval": 10, "CFG everywhere": 10, "IG and CFG": 10}
    }
    assert rows["IG"]["tflop_per_image"] == pytest.approx(5 * of_image() / 1e12)
    for each in rows.values():
        seconds = each["seconds_per_batch"]["median"]
        assert each["images_per_second"] * seconds == pytest.approx(4)
        rate = 4 * each["tflop_per_image"] / seconds / jax.device_count()
        assert each["model_tflops_per_device"] == pytest.approx(rate)
        assert each["mfu"] == pytest.approx(each["model_tflops_per_device"] / 0.5)
    assert found["decoder"] == {} and all(f"| {name} " in printed for name in rows)


def test_rows_can_be_left_out():
    exp = tiny.experiment()
    assert list(sample.settings(exp, cfg=False)) == ["none", "IG"]
    assert list(sample.settings(exp, ig=False)) == ["none", "CFG on its interval", "CFG everywhere"]
    plain = {"objective.terms": {"flow": {"weight": 1.0}}, "sample.ig.scale": 1.0}
    headless = tiny.experiment({"model.readouts": (), **plain})
    assert "IG" not in sample.settings(headless)


def test_the_published_sampler_of_sit_xl_takes_so_many_evaluations():
    """250 steps from 1 by 0.96 / 249 each, then to 0; CFG doubles those that begin at t <= 0.7."""
    exp = measuring.load("configs/sit_xl.py", devices=1)
    guided = 250 - math.ceil(0.3 / (0.96 / 249))
    rows = sample.settings(exp)
    generator = exp.pipeline.generator()
    counts = {name: sample.cost(generator, g)["evaluations"] for name, g in rows.items()}
    assert list(counts.values()) == [250, 250, 250 + guided, 500, 250 + guided]


def test_time_is_set_against_evaluations():
    def row(seconds: float, count: int) -> dict:
        return {"seconds_per_batch": {"median": seconds}, "evaluations": count}

    rows = {"none": row(2.0, 250), "IG": row(2.1, 250), "CFG everywhere": row(4.0, 500)}
    ratios = [sample.against_plain(rows, name) for name in rows]
    assert ratios == pytest.approx([1, 1.05, 1])


def test_the_random_decoder_has_the_published_size():
    """83,653,863 parameters in the safetensors file of sd-vae-ft-mse."""
    shapes = pytree.flatten(kl_names.shapes(sample.SD_VAE))
    assert sum(map(math.prod, shapes.values())) == 83_653_863
    small = kl_names.Sizes((32, 64), 1, frozenset(), latent_channels=4)
    assert set(sample.random_decoder(small)) == {"post_quant_conv", "decoder"}


@pytest.mark.slow
def test_decoding_is_measured_in_both_types():
    exp = measuring.load("tests/helpers/tiny.py", {"sample.batch_size": 4})
    small = kl_names.Sizes((32, 64), 1, frozenset(), latent_channels=exp.net.channels)
    found = sample.decoding(exp, small, lambda call: measuring.seconds(call, calls=1, windows=1))
    assert list(found) == ["float32", "bfloat16"]
    assert found["float32"]["planned_gib"] > 0


def test_a_smaller_depth_takes_its_early_heads_along():
    exp = measuring.load("configs/sit_xl.py", {"model.depth": 4}, devices=1)
    assert (exp.config.model.depth, exp.config.model.readouts) == (4, (3,))


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--config=configs/sit_xxl.py", "--config=configs/sit_xxl.py: no such file"),
        ("--devices=64", "--devices=64: there are 2 cpu"),
        ("--remat=much", "model.remat = 'much': must be one of"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(monkeypatch, capsys, flag, told):
    monkeypatch.setattr(sys, "argv", ["train.py", *QUICK, flag])
    with pytest.raises(SystemExit) as ended:
        train.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(f"error: {told}") and err.count("\n") == 1


def test_an_adaptive_sampler_is_refused():
    sampler = {"name": "dopri5", "num_steps": 9, "rtol": 1e-3, "atol": 1e-6}
    exp = tiny.experiment({"sample.sampler": sampler})
    with pytest.raises(UserError, match="'dopri5': chooses its own steps"):
        sample.cost(exp.pipeline.generator(), exp.config.sample.guidances)


@pytest.mark.slow
def test_judging_is_timed_from_pictures_to_every_measure(monkeypatch, tmp_path, capsys):
    file = tmp_path / "record.json"
    sizes = ["--batch=2", "--side=32", "--samples=60", "--references=50"]
    flags = [*sizes, "--calls=1", "--windows=1", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    found, printed = json.loads(file.read_text()), capsys.readouterr().out
    features = found["features"]
    rate, seconds = features["images_per_second"], features["seconds_per_batch"]["median"]
    assert rate * seconds == pytest.approx(2)
    assert features["bytes_kept_per_image"] == 4 * (2048 + 2023 + 1008)
    assert len(found["seconds"]) == 5 and all(f"| {name} " in printed for name in found["seconds"])
    assert "| 2 images of 32 pixels " in printed


def test_without_pytorch_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(torch_peer, "torch", None)
    monkeypatch.setattr(sys, "argv", ["torch_peer.py", *QUICK])
    with pytest.raises(SystemExit) as ended:
        torch_peer.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.count("\n") == 1 and "PyTorch is not installed" in err


@pytest.mark.parametrize(
    ("changes", "devices"),
    [({"model.qk_norm": True}, 1), ({"process.path": "cosine"}, 1), ({}, 2)],
)
def test_a_network_that_the_peer_is_not_is_refused(changes, devices):
    exp = tiny.experiment(changes, jax.devices()[:devices])
    with pytest.raises(UserError, match="the PyTorch peer"):
        torch_network.peer_of(exp, "cpu")


@pytest.mark.parametrize(
    ("path", "shape", "ours"),
    [
        ("mlp.fc1.kernel", (6, 4), "i,io->o"),
        ("attn.qkv.kernel", (6, 3, 2, 4), "i,iabc->abc"),
        ("attn.proj.kernel", (2, 3, 4), "ab,abo->o"),
        ("mlp.w12.kernel", (6, 2, 5), "i,iab->ab"),
    ],
)
def test_a_matrix_of_ours_gives_the_same_product_out_by_in(path, shape, ours):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape)
    x = rng.standard_normal(shape[:-1] if "proj" in path else shape[:1])
    published = torch_network.matrix(f"blocks.{path}", kernel) @ x.ravel()
    np.testing.assert_allclose(published, np.einsum(ours, x, kernel).ravel(), rtol=1e-12)


LIGHTNING = {
    "model": {
        **{"name": "lightningdit", "depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2},
        **{"mlp_ratio": 2.0, "qk_norm": False, "swiglu": True, "rope": True, "rms_norm": True},
        **{"shift": True, "readouts": (1,), "time_scale": 1.0, "dtype": "float32"},
        **{"remat": "none", "unroll": 1},
    },
    "objective.terms": {
        **{"flow": {"weight": 1.0}, "cosine": {"weight": 0.5}},
        "internal_guidance": {"weight": 0.25},
    },
}


MUON = {
    **{"name": "muon", "learning_rate": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8},
    **{"weight_decay": 0.01, "clip_norm": 1.0, "momentum": 0.9, "ns_steps": 5},
    **{"ns_dtype": "float32", "schedule": "constant", "warmup_steps": 0},
}


def lively_params(exp):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), exp.abstract_params
    )


@needs_torch
@pytest.mark.parametrize("changes", [{}, LIGHTNING], ids=["sit", "lightningdit"])
def test_the_peer_computes_our_loss(changes):
    exp = tiny.experiment(changes, devices=jax.devices()[:1])
    rng, params = np.random.default_rng(1), lively_params(exp)
    batch = jax.tree.map(lambda x: x[0], train.examples(exp))
    ready = train.noised(exp)(jnp.int32(0), batch, {})
    x0, labels = ready.x0, ready.labels
    noise = rng.standard_normal(x0.shape).astype(np.float32)
    t = rng.random(len(x0)).astype(np.float32)
    draws = Draws(time=jnp.asarray(t), noise=jnp.asarray(noise), drop=jnp.ones(len(x0)))
    ours, _ = exp.objective(params, x0, labels, draws)
    peer = torch_peer.Peer(exp, params, ready, compiled=False)
    tensor = torch_peer.torch.tensor
    given = tensor(noise.transpose(0, 3, 1, 2).copy()), tensor(t), tensor(np.array(labels)).long()
    loss = peer.loss(peer.x0, *given).detach()
    assert float(loss) == pytest.approx(float(ours), rel=1e-5)


@needs_torch
@pytest.mark.parametrize("changes", [{}, LIGHTNING], ids=["sit", "lightningdit"])
def test_the_peer_draws_our_samples(changes, monkeypatch):
    guided = {
        "sample.ig": {"scale": 1.7, "low": 0.2, "high": 0.8, "channels": 0},
        "sample.cfg": {"scale": 1.4, "low": 0.0, "high": 0.5, "channels": 0},
    }
    exp = tiny.experiment(changes | guided, devices=jax.devices()[:1])
    monkeypatch.setattr(
        torch_peer.step, "init_state", lambda exp: SimpleNamespace(params=lively_params(exp))
    )
    found = torch_peer.sampling(exp, SimpleNamespace(steps=5, calls=1, windows=1, compile=False))
    assert found["apart"] < 1e-5 and found["evaluations"] > 5


@needs_torch
@pytest.mark.parametrize("what", ["train", "sample"])
def test_the_peer_has_our_parameters_and_is_compared(run, what):
    printed, found = run("torch_peer", "--batch=4", "--devices=1", f"--what={what}")
    if what == "train":
        assert len(set(found["parameters"].values())) == 1
    assert found["ours_over_peer"]["median"] > 0
    assert "| ig_jax " in printed and "| PyTorch " in printed and ", eager |" in printed


@needs_torch
def test_the_peer_trains_with_muon_what_we_do():
    exp = tiny.experiment({**LIGHTNING, "optim": MUON}, devices=jax.devices()[:1])
    weights = torch_network.from_ours(lively_params(exp), "cpu")
    adam, muon = torch_peer.optimizers(exp, weights, "cpu")
    assert muon.param_groups[0]["momentum"] == 0.9
    each = [sum(len(group["params"]) for group in o.param_groups) for o in (adam, muon)]
    assert sum(each) == sum(w.requires_grad for w in weights.values())
    assert {"blocks.1.attn.qkv.kernel", "final_layer.linear.kernel"} < torch_network.matrices(
        exp.abstract_params
    )


@pytest.mark.slow
def test_it_is_a_command_that_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/train.py"), *QUICK, "--devices=64"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --devices=64"), done.stderr


FOR_A_GPU = """\
HloModule jit_dispatch, is_scheduled=true

%update (p0: bf16[28,8,16], p1: s32[], p2: bf16[8,16]) -> bf16[28,8,16] {
  %p0 = bf16[28,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[8,16]{1,0} parameter(2)
  %one = bf16[1,8,16]{2,1,0} bitcast(%p2)
  %zero = s32[] constant(0)
  %where = s32[] add(%p1, %zero)
  ROOT %dus = bf16[28,8,16]{2,1,0} dynamic-update-slice(%p0, %one, %where, %zero, /*i*/%zero)
}

%product (q0: bf16[28,16,32], q1: bf16[8,16], q2: s32[]) -> (bf16[8,32], s8[4096]) {
  %q0 = bf16[28,16,32]{2,1,0} parameter(0)
  %q1 = bf16[8,16]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %cut = bf16[1,16,32]{2,1,0} dynamic-slice(%q0, %q2, %q2, %q2), dynamic_slice_sizes={1,16,32}
  %own = bf16[16,32]{1,0} bitcast(%cut)
  ROOT %gemm = (bf16[8,32]{1,0}, s8[4096]{0}) custom-call(%q1, %own), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(dispatch)/jvp()/dot_general"}, \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
}

%average (r0: f32[64], r1: f32[64]) -> (f32[64], f32[64]) {
  %r0 = f32[64]{0} parameter(0)
  %r1 = f32[64]{0} parameter(1)
  %sum = f32[64]{0} add(%r0, %r1)
  ROOT %both = (f32[64]{0}, f32[64]{0}) tuple(%sum, %r1)
}

%inner (s: (s32[], bf16[2,8,4,6])) -> (s32[], bf16[2,8,4,6]) {
  %s = (s32[], bf16[2,8,4,6]{3,2,1,0}) parameter(0)
  %x = bf16[2,8,4,6]{3,2,1,0} get-tuple-element(%s), index=1
  %att = (bf16[2,4,8,6]{3,1,2,0}, u8[512]{0}) custom-call(%x, %x, %x), \
custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %t = (s32[], bf16[2,8,4,6]{3,2,1,0}) tuple(%i, %x)
}

%body (u: (bf16[28,8,16], bf16[8,16])) -> (bf16[28,8,16], bf16[8,16]) {
  %u = (bf16[28,8,16]{2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %w = bf16[28,16,32]{2,1,0} get-tuple-element(%u), index=2
  %y = bf16[8,16]{1,0} get-tuple-element(%u), index=1
  %i = s32[] get-tuple-element(%u), index=3
  %mm = (bf16[8,32]{1,0}, s8[4096]{0}) fusion(%w, %y, %i), kind=kCustom, calls=%product
  %begun = ((bf16[28,8,16]{2,1,0}, s32[], bf16[8,16]{1,0}), bf16[28,8,16]{2,1,0}, u32[]) \
fusion-start(%stack, %i, %y), kind=kLoop, calls=%update
  %ended = bf16[28,8,16]{2,1,0} fusion-done(%begun)
  %again = (s32[], bf16[2,8,4,6]{3,2,1,0}) while(%st), condition=%less, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = (bf16[28,8,16]{2,1,0}, bf16[8,16]{1,0}) tuple(%ended, %y)
}

%less (c: (s32[], bf16[2,8,4,6])) -> pred[] {
  %c = (s32[], bf16[2,8,4,6]{3,2,1,0}) parameter(0)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

%once (a0: f32[64]) -> f32[64] {
  %a0 = f32[64]{0} parameter(0)
  ROOT %exp = f32[64]{0} exponential(%a0), metadata={op_name="jit(dispatch)/jvp()/exp"}
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %loop = (bf16[28,8,16]{2,1,0}, bf16[8,16]{1,0}) while(%init), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"28"}}
  %called = f32[64]{0} call(%a), to_apply=%once
  %new = (f32[64]{0}, f32[64]{0}) fusion(%a, %called), kind=kLoop, calls=%average, \
metadata={op_name="jit(dispatch)/add"}
  ROOT %copy = f32[64]{0} copy(%a)
}
"""


def found_kernels() -> dict[str, roofline.Kernel]:
    return {k.name: k for k in roofline.kernels(FOR_A_GPU)}


def test_a_kernel_runs_as_often_as_the_loops_around_it():
    times = {name: k.times for name, k in found_kernels().items()}
    assert times == {"mm": 28, "begun": 28, "att": 28 * 3, "exp": 1, "new": 1, "copy": 1}
    computations, entry = roofline.parse(FOR_A_GPU.replace("known_trip_count", "unknown"))
    assert roofline.passes(computations, entry) == {"main": 1, "body": 1, "inner": 1, "once": 1}


def test_a_kernel_moves_what_it_cuts_and_what_is_new():
    """One of 28 slices of a stack, read or written; a library's workspace is neither."""
    moved = {name: k.bytes for name, k in found_kernels().items()}
    assert moved == {
        "mm": 2 * (16 * 32 + 8 * 16 + 8 * 32) + 4,  # and the index of the slice
        "begun": 2 * (8 * 16 + 8 * 16) + 4,
        "att": 2 * (3 + 1) * 2 * 8 * 4 * 6,
        "exp": 2 * 4 * 64,
        "new": 4 * 4 * 64,
        "copy": 2 * 4 * 64,
    }


def test_products_are_told_by_their_flops_and_all_kernels_by_their_kind():
    found = found_kernels()
    work = {name: k.flops for name, k in found.items() if k.flops}
    assert work == {"mm": 2 * 8 * 16 * 32, "att": 2 * 2 * (2 * 8 * 4 * 6) * 8}
    assert {name: k.kind for name, k in found.items()} == {
        "mm": roofline.PRODUCTS,
        "begun": roofline.MOVES,
        "att": roofline.ATTENTION,
        "exp": roofline.OTHERS,
        "new": roofline.OPTIMIZER,
        "copy": roofline.MOVES,
    }
    parts = gpu_aot.totals(list(found.values()))
    assert sum(part["seconds"] for part in parts.values()) == sum(k.seconds for k in found.values())
    assert parts[roofline.PRODUCTS]["tflop"] * 1e12 == pytest.approx(28 * work["mm"])
    assert parts[roofline.MOVES]["gib"] * 2**30 == pytest.approx(28 * 516 + 512)


def test_a_kernel_takes_the_larger_of_its_two_times():
    def seconds(flops: float, moved: float) -> float:
        return roofline.Kernel("k", roofline.OTHERS, flops, moved, 3, "").seconds

    assert seconds(roofline.RATE, roofline.BANDWIDTH / 2) == pytest.approx(3)
    assert seconds(roofline.RATE / 2, 2 * roofline.BANDWIDTH) == pytest.approx(6)


def test_without_the_cuda_plugin_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax_cuda12_plugin", None)  # cannot be found
    monkeypatch.setattr(sys, "argv", ["gpu_aot.py", "--what=sample"])
    with pytest.raises(SystemExit) as ended:
        gpu_aot.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.count("\n") == 1 and 'pip install -r requirements.txt "jax[cuda12]"' in err
