"""What every kernel of a program compiled for a GPU takes at least, read off its text.

A kernel takes the larger of two times, its FLOPs at RATE and its bytes at BANDWIDTH, as often as
the loops around it run. What its operands and results are is all that is known of its bytes: what
it reads twice counts once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

RATE = 790e12  # FLOP/s that large bfloat16 products reach, of 989.5e12 by the data sheet
BANDWIDTH = 0.9 * 4.8e12  # bytes/s: large copies reach nine tenths of the data sheet's

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
    calls = [y for y in body if y.op == "custom-call"]
    for call in calls:
        stored = size(re.sub(r", [su]8\[.*", "", call.type))  # without its workspace
        work = product_flops(call, [(fused or around)[n].type for n in call.operands])
    source = next(filter(None, (y.named(_SOURCE) for y in (x, *calls))), "")
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
