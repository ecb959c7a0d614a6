"""Damages small files of every kind that is read, at random, and reads them.

  python tests/helpers/fuzz_readers.py --num=2000 --seed=0 [--only=npz]

What may come of a damaged file is a value, or the project's own error in one sentence. Anything
else is a failure: another exception, a warning, memory beyond `ROOM` and `PER_BYTE` of the file's
size, more than `SECONDS`, or the end of the process. So files are read in a child process, and the
next child goes on behind the file that ended the last one. The same seed gives the same damage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from places import ROOT

sys.path.insert(0, str(ROOT))  # runnable from anywhere

from kinds_of_files import CASES, Case, Parts

ROOM, PER_BYTE = 64 << 20, 8  # bytes of memory that reading may take
SECONDS = 60  # a hundred thousand times what it takes
LONGEST = 1000  # characters of an error
SHARE = 512 << 10  # bytes of a thread's stack, in place of 8 MiB

# Damage

NUMBER = re.compile(rb"\d+")
ODD = [b"-1", b"0", b"1e9", b"4.5", b"99999999999999999999", b"[]", b"null", b"true", b"{}", b'""']


def _damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one to three changes."""
    for _ in range(rng.integers(1, 4)):
        place, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 17))
        noise = rng.integers(0, 256, length, np.uint8).tobytes()
        match rng.integers(8):
            case 0 | 1:
                bits = bytearray(content)
                for at in rng.integers(8 * len(bits), size=rng.integers(1, 9)) if bits else ():
                    bits[at // 8] ^= 1 << (at % 8)
                content = bytes(bits)
            case 2:
                fill = [noise, bytes(length), b"\xff" * length][rng.integers(3)]
                content = content[:place] + fill + content[place + length :]
            case 3:
                content = content[:place]
            case 4:
                content = content[:place] + noise + content[place:]
            case 5:
                content = content[:place] + content[place + length :]
            case 6:
                again = content[place : place + int(rng.integers(1, 200))]
                content = content[:place] + again * int(rng.integers(2, 20)) + content[place:]
            case 7:
                found = list(NUMBER.finditer(content))
                if found:
                    start, end = found[rng.integers(len(found))].span()
                    content = content[:start] + ODD[rng.integers(len(ODD))] + content[end:]
    return content


def _damaged_parts(parts: Parts, name: str, number: int, seed: int) -> Parts:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    chosen = sorted(parts)[rng.integers(len(parts))]
    return {**parts, chosen: _damaged(parts[chosen], rng)}


# The child


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _outcome(case: Case, folder: Path) -> str:
    """What is wrong with how the files in the folder are read; '': nothing."""
    from ig_jax.errors import UserError

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM + PER_BYTE * size, hard))
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.read(folder)
    except UserError as error:
        text = str(error)
        return f"its error is long: {text!r}" if "\n" in text or len(text) > LONGEST else ""
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return ""


def _child(jobs: list[tuple[str, int]], seed: int) -> None:
    """Writes a line of JSON before each job, and one behind it: what was wrong."""
    threading.stack_size(SHARE)
    known: dict[str, Parts] = {}
    for name, number in jobs:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as root:
            if name not in known:
                known[name] = case.parts()
                (Path(root) / "whole").mkdir()
                case.build(Path(root) / "whole", known[name])
                case.read(Path(root) / "whole")  # it imports what is needed
            print(json.dumps({"job": [name, number]}), flush=True)
            folder = Path(root) / "damaged"
            folder.mkdir()
            case.build(folder, _damaged_parts(known[name], name, number, seed))
            print(json.dumps({"wrong": _outcome(case, folder)}), flush=True)


# The parent


def failures(jobs: list[tuple[str, int]], seed: int) -> Iterator[str]:
    """What went wrong, of jobs (case, number), in their order."""
    # More arenas would each take address space, as many as there are threads.
    settings = {"MALLOC_ARENA_MAX": "1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    while jobs:
        command = [sys.executable, __file__, "--child", f"--seed={seed}"]
        child = subprocess.run(
            command,
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            env={**os.environ, **settings},
        )
        lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
        started = [line["job"] for line in lines if "job" in line]
        ended = [line["wrong"] for line in lines if "wrong" in line]
        for (name, number), wrong in zip(started, ended, strict=False):
            if wrong:
                yield f"{name} {number}: {wrong}"
        jobs = jobs[len(started) :]
        if len(started) > len(ended):
            name, number = started[-1]
            yield f"{name} {number}: the process ended with {child.returncode}"
        elif child.returncode:  # before it began to damage files of another kind
            if not jobs:
                raise RuntimeError(child.stderr)
            yield f"{jobs[0][0]}: cannot be made or read whole:\n{child.stderr}"
            jobs = [job for job in jobs if job[0] != jobs[0][0]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=2000, help="of damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CASES, action="append", help="a kind; all by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(json.load(sys.stdin), options.seed)
        return 0
    jobs = [(name, number) for name in options.only or CASES for number in range(options.num)]
    count = 0
    for count, failure in enumerate(failures(jobs, options.seed), 1):  # noqa: B007
        print(failure, flush=True)
    print(f"{len(jobs):,} damaged files, {count:,} failures")
    return bool(count)


if __name__ == "__main__":
    sys.exit(main())
