"""What the devices of a compiled program send each other, read from the text of its HLO.

A collective is counted where it stands: in the body of a loop, or outside of all. Two forms of a
TPU's programs are seen through. A large collective is taken apart into steps beside computation,
all of which repeat it with the same `chain_id`: these are one. And an all-reduce of which every
device keeps its share only, in a computation called so, is a reduce-scatter.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16} | {f"{t}{n}": n for t in "sufc" for n in (8, 16, 32, 64)}
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"(\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(([^)]*)\)")
_CALLED = re.compile(r"(\w+)=%([\w.\-]+)|(?:branch|called)_computations=\{([^}]*)\}")
_CHAIN = re.compile(r'chain_id="(\w+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")

Computations = Mapping[str, Mapping[str, str]]  # name -> instruction -> what stands behind its `=`


class Sent(NamedTuple):
    """A collective: of KINDS, with the larger of what goes in and what comes out of it."""

    kind: str
    arrays: tuple[str, ...]  # such as bf16[1152,3456]; several where XLA has combined them
    in_loop: bool

    @property
    def bytes(self) -> int:
        return sum(map(_bytes, self.arrays))


def _bytes(array: str) -> int:
    dtype, shape = _ARRAY.match(array).groups()
    return math.prod(int(n) for n in shape.split(",") if n) * _BITS[dtype] // 8


def _arrays(text: str) -> tuple[str, ...]:
    """Those in the text of a type, without their layouts."""
    return tuple(f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(text))


def _size(arrays: tuple[str, ...]) -> int:
    return sum(map(_bytes, arrays))


def _parse(text: str) -> tuple[Computations, str]:
    """All computations, and the name of the one that a program starts with."""
    computations: dict[str, dict[str, str]] = {}
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            here[found[1]] = found[2]
    return computations, entry


def _payload(found: re.Match, computation: Mapping[str, str]) -> tuple[str, ...]:
    result, _, start, operands = found.groups()
    if start:  # what went in stands in the result, too, with flags
        return (max(_arrays(result), key=_bytes),)
    names = re.findall(r"%([\w.\-]+)", operands)
    types = [computation.get(name, "").split(" ", 1)[0] for name in names]
    return max(_arrays(result), _arrays(" ".join(types)), key=_size)


def _called(line: str) -> Iterator[tuple[str, bool]]:
    """Computations that an instruction runs, and whether in a loop."""
    for how, name, several in _CALLED.findall(line):
        for each in [name] if name else re.findall(r"%([\w.\-]+)", several):
            yield each, how in ("body", "condition")


def collectives(text: str) -> Counter[Sent]:
    """How many of which are in a compiled program.

    Args:
      text: optimised HLO, as `jax.stages.Compiled.as_text` gives it.
    """
    computations, entry = _parse(text)
    found: Counter[Sent] = Counter()
    chains: set[tuple[str, Sent]] = set()

    def visit(name: str, in_loop: bool) -> None:
        for line in computations.get(name, {}).values():
            if collective := _COLLECTIVE.match(line):
                scattered = name.startswith("all-reduce-scatter")
                kind = "reduce-scatter" if scattered else collective[2]
                sent = Sent(kind, _payload(collective, computations[name]), in_loop)
                chain = _CHAIN.search(line)
                if not chain or (chain[1], sent) not in chains:
                    found[sent] += 1
                if chain:
                    chains.add((chain[1], sent))
            for called, loop in _called(line):
                visit(called, in_loop or loop)

    visit(entry, False)
    return found


def report(text: str) -> list[dict[str, Any]]:
    """`collectives` for a record: those in loops first, of them the largest."""
    found = sorted(collectives(text).items(), key=lambda x: (-x[0].in_loop, -x[0].bytes))
    return [
        {
            "kind": sent.kind,
            "in_loop": sent.in_loop,
            "count": count,
            "mib_each": round(sent.bytes / 2**20, 3),
            "arrays": sent.arrays,
        }
        for sent, count in found
    ]


def summary(reported: Sequence[Mapping[str, Any]], *, in_loop: bool) -> str:
    """`10 all-gather bf16 98 MiB, ...` of what `report` has in loops, or of the rest."""
    totals: dict[tuple[str, str], tuple[int, float]] = {}
    for each in reported:
        if each["in_loop"] == in_loop:
            key = each["kind"], each["arrays"][0].partition("[")[0]
            count, mib = totals.get(key, (0, 0.0))
            totals[key] = count + each["count"], mib + each["count"] * each["mib_each"]
    words = [f"{n} {kind} {dtype} {mib:.0f} MiB" for (kind, dtype), (n, mib) in totals.items()]
    return ", ".join(words) or "none"
