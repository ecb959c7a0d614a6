"""Whether the memory of a long run grows: a tiny one, for as long as one likes.

  python benchmarks/memory.py [--minutes=60] [--save_every=40]

Trains in a process of its own, which saves a checkpoint every few steps, and looks every few
seconds at the memory that it holds: resident pages, and, with glibc, the bytes that malloc has
handed out and not got back. The second is what a leak adds to; the first also moves by tens of MiB
with how full the allocator's pages are. Gives the slope over the last half, when all that is made
once is there: a line through the means of ten parts of it, with the error that their scatter
implies.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    **{"model.depth": 2, "model.hidden_size": 16, "model.num_heads": 2, "model.readouts": "(1,)"},
    **{"model.unroll": 1, "train.batch_size": 16, "train.steps_per_dispatch": 4},
    **{"train.steps": 10**8, "log.every_steps": 40, "log.samples_every_steps": 0},
}
EVERY = 2.0  # seconds between two looks
PARTS = 10
T_975 = 2.306  # Student's t of PARTS - 2 degrees of freedom


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kib,) = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(kib) / 1024


class _MallInfo(ctypes.Structure):
    """What mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


def record_in_use(file: Path) -> None:
    """Appends the MiB that malloc has handed out in this process to `file`, every few seconds."""
    info = ctypes.CDLL("libc.so.6").mallinfo2
    info.restype = _MallInfo
    while True:
        found = info()
        with open(file, "a") as lines:
            lines.write(f"{(found.uordblks + found.hblkhd) / 2**20}\n")
        time.sleep(EVERY)


def train(file: Path) -> None:
    """The run that is watched; flags of the program follow --train FILE on the command line."""
    sys.path.insert(0, str(ROOT))
    from ig_jax import cli

    if hasattr(ctypes.CDLL(None), "mallinfo2"):
        threading.Thread(target=record_in_use, args=(file,), daemon=True).start()
    cli.entry()


def growth(hours: np.ndarray, mib: np.ndarray) -> dict[str, float]:
    """MiB an hour over the last half of the series, half its 95 % interval, and the ends in MiB."""
    late = hours >= hours[-1] / 2
    t, m = (
        np.array([part.mean() for part in np.array_split(x[late], PARTS)]) for x in (hours, mib)
    )
    slope, start = np.polyfit(t, m, 1)
    scatter = np.sum((m - slope * t - start) ** 2) / (PARTS - 2)
    error = np.sqrt(scatter / np.sum((t - t.mean()) ** 2))
    return {
        "mib_per_hour": float(slope),
        "plus_or_minus": float(T_975 * error),
        "mib_at_half": float(m[0]),
        "mib_at_end": float(m[-1]),
    }


def watch(minutes: float, save_every: int, workdir: Path, in_use: Path) -> np.ndarray:
    """[n, 2]: hours since the start and resident MiB of a run in `workdir`; it fills `in_use`."""
    fields = {**TINY, "checkpoint.every_steps": save_every}
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [sys.executable, __file__, "--train", str(in_use)]
    command += ["--config=configs/digits.py", f"--workdir={workdir}"]
    rows, begun = [], time.monotonic()
    with subprocess.Popen(
        [*command, *given], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        while time.monotonic() - begun < 60 * minutes:
            time.sleep(EVERY)
            if run.poll() is not None:
                raise SystemExit(f"error: the run ended by itself, with status {run.returncode}")
            rows.append(((time.monotonic() - begun) / 3600, resident(run.pid)))
        run.send_signal(signal.SIGTERM)
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--save_every", type=int, default=40)
    parser.add_argument("--json", type=Path, help="also write the series to this file")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        in_use = Path(folder) / "in_use.txt"
        hours, mib = watch(flags.minutes, flags.save_every, Path(folder) / "run", in_use).T
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        steps = json.loads(lines[-1])["step"]
        handed_out = np.loadtxt(in_use) if in_use.exists() else None
    found = {"steps": steps, "saves": steps // flags.save_every, "resident": growth(hours, mib)}
    series = {"hours": hours.tolist(), "mib": mib.tolist()}
    if handed_out is not None:
        at = np.linspace(0, hours[-1], len(handed_out))
        found["in_use"] = growth(at, handed_out)
        series["in_use"] = handed_out.tolist()
    print(json.dumps(found, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps({**found, **series}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        results = Path(sys.argv[2])
        del sys.argv[1:3]
        train(results)
    else:
        main()
