"""The least time that a train step or the sampler takes on an H200, found where there is none.

  python benchmarks/gpu_aot.py [--config=configs/sit_xl.py] [--batch=64] [--unroll=28] [--top=20]
  python benchmarks/gpu_aot.py --what=sample --batch=64 --json=runs/gpu_aot.json

Needs JAX's CUDA plugin in an environment of its own, and no GPU: XLA compiles for the H200 that
h200.txt describes, a step of SiT-XL/2 in half a minute, with all blocks written out in two. Every
kernel of the optimised program takes the larger of two times, its FLOPs at RATE and its bytes at
BANDWIDTH, as often as the loops around it run. MFU is of the model (ig_jax/flops.py).

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
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from benchmarks import measuring, sample, tpu_aot
from ig_jax import build, drawing, flops
from ig_jax.build import Experiment
from ig_jax.errors import UserError

H200 = Path(__file__).with_name("h200.txt")  # a GpuTargetConfigProto
RATE = 790e12  # FLOP/s that large bfloat16 products reach, of 989.5e12 by the data sheet
BANDWIDTH = 0.9 * 4.8e12  # bytes/s: large copies reach nine tenths of the data sheet's
CUDNN = 90800  # the version that h200.txt names
MISSING = (
    "JAX's CUDA plugin is not installed: it compiles for a GPU where there is none; install it in "
    'an environment of its own with `pip install -r requirements.txt "jax[cuda12]"`'
)

PRODUCTS, ATTENTION = "matrix products", "attention (cuDNN)"
MOVES, OPTIMIZER = "copies, stacks of a loop", "clipping, optimizer, averages"
OTHERS = "element by element"
KINDS = (PRODUCTS, ATTENTION, OTHERS, MOVES, OPTIMIZER)

_ARRAY = re.compile(r"\b[a-z]+(\d*)\[([\d,]*)\]")
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^()]*)\)(.*)$")
_TARGET = r'custom_call_target="([^"]*)"'
_SOURCE = r'op_name="([^"]*)"'
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"}
_NO_KERNEL |= {"while", "call", "conditional", "partition-id"}
_VIEWS = {"bitcast", "reshape", "get-tuple-element"}
_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATE = "dynamic-update-slice"
_MOVING = _VIEWS | _SLICES | {_UPDATE, "parameter", "constant", "tuple", "copy", "transpose"}
_MOVING |= {"broadcast", "concatenate", "pad"}
_WITHIN_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}  # products


class Instruction(NamedTuple):
    """A line of a computation."""

    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def named(self, pattern: str) -> str:
        """What the only group of `pattern` finds in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


Computation = Mapping[str, Instruction]


class Kernel(NamedTuple):
    """What is launched, and how often; FLOPs and bytes are of one launch."""

    name: str
    kind: str  # of KINDS
    flops: int
    bytes: int
    times: int
    source: str  # what JAX calls its operation

    @property
    def seconds(self) -> float:
        """At least, of all launches."""
        return self.times * max(self.flops / RATE, self.bytes / BANDWIDTH)


def parse(text: str) -> tuple[Mapping[str, Computation], str]:
    """All computations of optimised HLO, and the name of the one it starts with."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, kind, op, operands, attributes = found.groups()
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            here[name] = Instruction(kind, op, names, attributes, bool(root))
    return computations, entry


def shapes(arrays: str) -> list[tuple[int, list[int]]]:
    """Bits of an element (a `pred` has 8) and shape of each array in the text of a type."""
    found = _ARRAY.findall(arrays)
    return [(int(bits or 8), [int(n) for n in dims.split(",") if n]) for bits, dims in found]


def size(arrays: str) -> int:
    """Bytes of all arrays in the text of a type."""
    return sum(bits * math.prod(dims) // 8 for bits, dims in shapes(arrays))


def passes(computations: Mapping[str, Computation], entry: str) -> Counter[str]:
    """How often each computation runs that is no part of a kernel."""
    counts: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for x in computations[name].values():
            if x.op == "while":
                known = x.named(r'"known_trip_count":\{"n":"(\d+)"')
                visit(x.named(r"body=%([\w.\-]+)"), times * int(known or 1))
            elif x.op == "call":
                visit(x.named(r"to_apply=%([\w.\-]+)"), times)

    visit(entry, 1)
    return counts


def read(fused: Computation, name: str) -> int:
    """Bytes of a fusion's parameter that it looks at: of what is only cut, the pieces."""
    seen, whole = 0, size(fused[name].type)
    for user, x in fused.items():
        if name not in x.operands:
            continue
        if x.op in _VIEWS:
            seen += read(fused, user)
        elif x.op in _SLICES and x.operands[0] == name:
            seen += size(x.type)
        elif x.op != _UPDATE or x.operands[0] != name:  # the rest of an updated array stays
            return whole
    return min(seen, whole)


def written(fused: Computation, x: Instruction) -> int:
    """Bytes that a fusion of root `x` leaves behind: of an updated array, what is new."""
    if x.op == "tuple":
        return sum(written(fused, fused[name]) for name in x.operands)
    if x.op == "bitcast":
        return written(fused, fused[x.operands[0]])
    return size(fused[x.operands[1]].type if x.op == _UPDATE else x.type)


def product_flops(call: Instruction, types: list[str]) -> int:
    """Of a library's kernel for arrays of these types; 0 where it is no product of matrices."""
    dims = [shape for _, shape in shapes(" ".join(types))]
    if products := _WITHIN_ATTENTION.get(call.named(_TARGET)):
        queries, keys = dims[:2]  # [batch, tokens, heads, channels]
        return products * 2 * math.prod(queries) * keys[1]
    summed = re.findall(r"\d+", call.named(r'"lhs_contracting_dimensions":\[([^\]]*)\]'))
    if not summed:
        return 0
    _, result = shapes(call.type)[0]
    return 2 * math.prod(result) * math.prod(dims[0][int(d)] for d in summed)


def kind_of(body: Sequence[Instruction], source: str) -> str:
    """One of KINDS, for a kernel of these instructions that JAX calls `source`."""
    targets = "".join(x.named(_TARGET) for x in body)
    if "fmha" in targets:
        return ATTENTION
    if "cublas" in targets or "conv" in targets:
        return PRODUCTS
    if all(x.op in _MOVING for x in body if "[]" not in x.type):  # scalars are where to, not what
        return MOVES
    # Of a train step. JAX calls what is differentiated jvp; what it does not name may be so, too.
    return OTHERS if "jvp(" in source or not source.startswith("jit(dispatch)") else OPTIMIZER


def kernel(
    computations: Mapping[str, Computation], around: Computation, name: str, times: int
) -> Kernel:
    """The kernel that instruction `name` of the computation `around` it launches."""
    x = around[name]
    if fused := computations.get(x.named(r"calls=%([\w.\-]+)"), {}):
        loaded = sum(read(fused, n) for n, y in fused.items() if y.op == "parameter")
        stored = written(fused, next(y for y in fused.values() if y.is_root))
    else:
        loaded, stored = sum(size(around[n].type) for n in x.operands), size(x.type)
    work, body = 0, list(fused.values()) or [x]
    for call in (y for y in body if y.op == "custom-call"):
        stored = size(re.sub(r", [su]8\[.*", "", call.type))  # without its workspace
        work = product_flops(call, [(fused or around)[n].type for n in call.operands])
    source = next(filter(None, (y.named(_SOURCE) for y in (x, *body))), "")
    return Kernel(name, kind_of(body, source), work, loaded + stored, times, source)


def kernels(text: str) -> list[Kernel]:
    """All of a compiled program (`jax.stages.Compiled.as_text`), the longest first."""
    computations, entry = parse(text)
    found = [
        kernel(computations, computations[name], each, times)
        for name, times in passes(computations, entry).items()
        for each, x in computations[name].items()
        if x.op not in _NO_KERNEL and not x.op.endswith("-done")
    ]
    return sorted(found, key=lambda k: -k.seconds)


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


def totals(found: Sequence[Kernel]) -> dict[str, dict[str, float]]:
    """Kind -> what its kernels take together."""
    parts = {kind: [k for k in found if k.kind == kind] for kind in KINDS}
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
        batch, of_image = c.train.batch_size, flops.train_step(exp.net, exp.abstract_params, 1)
    else:
        cost = sample.cost(drawing.Generator(exp), c.sample.guidances)
        batch, of_image = c.sample.batch_size, cost["flops"]
    program, compile_seconds = compiled(exp, what)
    found = kernels(program.as_text())
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
        exp = build.experiment(c, devices)
        record = {"what": flags.what, **measuring.circumstances(exp, flags)}
        record |= measure(exp, flags.what, flags.top)
    tables = [summary(record), parts_table(record)] + [kernels_table(record)] * bool(flags.top)
    measuring.tell(record, *tables, json_file=flags.json)


if __name__ == "__main__":
    main()
