"""The least time that a train step or the sampler takes on an H200, found where there is none.

  python benchmarks/gpu_aot.py [--config=configs/sit_xl.py] [--batch=64] [--unroll=28] [--top=20]
  python benchmarks/gpu_aot.py --what=sample --batch=64 --json=runs/gpu_aot.json

Needs JAX's CUDA plugin in an environment of its own, and no GPU: XLA compiles for the H200 that
h200.txt describes, a step of SiT-XL/2 in half a minute, all blocks written out in one or two. Every
kernel of the optimised program takes what its FLOPs or its bytes take at least (roofline.py). MFU
is of the model (ig_jax/monitoring/flops.py).

The sum is a lower bound of time, and no measurement. It leaves out launches, waiting, padding
inside a kernel, products that are slower than large bfloat16 ones, branches, and all but one pass
of a loop of which XLA does not know how many there are. Nothing is tuned, as that takes a GPU:
products go to cuBLAS, not to Triton. What JAX asks of a GPU before it takes cuDNN's attention is
answered by hand: that there is one, of compute capability 9.0, with cuDNN 9.8.

One H200 is described and nothing runs, so --windows and --calls have no meaning here.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from benchmarks import measuring, roofline, sample, tpu_aot
from ig_jax import experiment
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment

H200 = Path(__file__).with_name("h200.txt")  # a GpuTargetConfigProto
CUDNN = 90800  # the version that h200.txt names
MISSING = (
    "JAX's CUDA plugin is not installed: it compiles for a GPU where there is none; install it in "
    'an environment of its own with `pip install -r requirements.txt "jax[cuda12]"`'
)


def described_device() -> list[Any]:
    """An H200 that can be compiled for, but holds nothing."""
    jax.config.update("jax_platforms", "cpu")  # the default, as the GPU is not there
    target = {"topology": "1x1x1", "target_config": H200.read_text()}
    return topologies.get_topology_desc("H200", platform="cuda", **target).devices


def compiled(exp: Experiment, what: str) -> tuple[jax.stages.Compiled, float]:
    """The program for a described GPU, and how many seconds XLA took."""
    with (
        mock.patch.object(jax, "default_backend", lambda: "gpu"),
        mock.patch.object(cudnn, "check_cudnn_version", lambda: CUDNN),
        mock.patch.object(cudnn, "check_compute_capability", lambda needed: needed == "9.0"),
    ):
        lowered = tpu_aot.LOWER[what](exp)
    start = time.perf_counter()
    program = lowered.compile({"xla_gpu_enable_triton_gemm": False})
    return program, time.perf_counter() - start


def totals(found: Sequence[roofline.Kernel]) -> dict[str, dict[str, float]]:
    """Kind -> what its kernels take together."""
    parts = {kind: [k for k in found if k.kind == kind] for kind in roofline.KINDS}
    return {
        kind: {
            "seconds": sum(k.seconds for k in part),
            "tflop": sum(k.times * k.flops for k in part) / 1e12,
            "gib": sum(k.times * k.bytes for k in part) / measuring.GIB,
        }
        for kind, part in parts.items()
        if part
    }


def measure(exp: Experiment, what: str, top: int) -> dict[str, Any]:
    """The record of one program, with so many of its kernels."""
    c = exp.config
    if what == "train":
        batch, of_image = c.train.batch_size, exp.gradient_flops(1)
    else:
        cost = sample.cost(exp.pipeline.generator(), c.sample.guidances)
        batch, of_image = c.sample.batch_size, cost["flops"]
    program, compile_seconds = compiled(exp, what)
    found = roofline.kernels(program.as_text())
    seconds = sum(k.seconds for k in found)
    return {
        "batch": batch,
        "least_seconds": seconds,
        "images_per_second": batch / seconds,
        **sample.rates(exp, of_image, seconds / batch),
        "temporaries_gib": program.memory_analysis().temp_size_in_bytes / measuring.GIB,
        "compile_seconds": compile_seconds,
        "parts": totals(found),
        "kernels": [k._asdict() | {"seconds": k.seconds} for k in found[:top]],
    }


def summary(found: Mapping[str, Any]) -> list[list[str]]:
    unit, one = ("ms a step", 1e-3) if found["what"] == "train" else ("s a batch", 1)
    head = ["images", f"at least, {unit}", "at most, images/s", "MFU", "temporaries GiB"]
    row = [str(found["batch"]), f"{found['least_seconds'] / one:.2f}"]
    row += [f"{found['images_per_second']:.4g}", f"{found['mfu']:.1%}"]
    row += [f"{found['temporaries_gib']:.1f}", f"{found['compile_seconds']:.0f}"]
    return [[*head, "compile s"], row]


def parts_table(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [[found["what"], "ms", "of all", "TFLOP", "GiB moved"]]
    for kind, part in found["parts"].items():
        share = f"{part['seconds'] / found['least_seconds']:.1%}"
        row = [kind, f"{part['seconds'] * 1e3:.1f}", share, f"{part['tflop']:.1f}"]
        rows.append([*row, f"{part['gib']:.1f}"])
    return rows


def kernels_table(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["kernel", "ms", "launches", "GFLOP each", "MiB each", "part", "of"]]
    for k in found["kernels"]:
        row = [k["name"], f"{k['seconds'] * 1e3:.2f}", str(k["times"]), f"{k['flops'] / 1e9:.0f}"]
        rows.append([*row, f"{k['bytes'] / 2**20:.1f}", k["kind"], k["source"][-60:]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    measuring.add_flags(parser)
    parser.add_argument("--what", default="train", choices=tpu_aot.LOWER)
    parser.add_argument("--top", type=int, default=0, help="how many kernels to list")
    flags = parser.parse_args()
    with measuring.mistakes_told():
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise UserError(MISSING)
        devices = described_device()
        asked = measuring.changes(flags)
        c = measuring.load(flags.config, asked, flags.devices or len(devices)).config
        exp = experiment.experiment(c, devices)
        record = {"what": flags.what, **measuring.circumstances(exp, flags)}
        record |= measure(exp, flags.what, flags.top)
    tables = [summary(record), parts_table(record)] + [kernels_table(record)] * bool(flags.top)
    measuring.tell(record, *tables, json_file=flags.json)


if __name__ == "__main__":
    main()
