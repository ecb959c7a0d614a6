"""Time and memory of the demo, as a user meets them: from the command to the table.

  python benchmarks/demo.py [--cores=2]

Runs main.py in a fresh folder, three times: until the first training steps are done, the whole
demo, and the whole demo once more in another folder, with the programs that were compiled before.
Prints seconds and the peak resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ig_jax.io import compilation_cache


def run(workdir: Path, programs: Path, *flags: str) -> tuple[float, float]:
    """(seconds, peak GiB) of one run of main.py, which writes what it says to `workdir`.log.

    Compiled programs are read from and kept in `programs`, as short ones as main.py itself keeps.
    """
    command = [sys.executable, "main.py", "--config=configs/digits.py", f"--workdir={workdir}"]
    shortest = str(compilation_cache.SHORTEST_SECONDS)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": shortest,
    }
    start = time.perf_counter()
    with open(f"{workdir}.log", "w") as log:
        process = subprocess.Popen(
            [*command, *flags], cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"main.py ended with status {os.waitstatus_to_exitcode(status)}: {workdir}.log")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cores", type=int, default=2, help="processor cores the runs may use")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])

    folder = Path(tempfile.mkdtemp(prefix="ig_jax_demo_"))
    short = ("--mode=train", "--config.train.steps=20", "--config.log.samples_every_steps=0")
    first, _ = run(folder / "first", folder / "programs_of_first", *short)
    whole, memory = run(folder / "whole", folder / "programs", "--mode=demo")
    again, _ = run(folder / "again", folder / "programs", "--mode=demo")
    parts = json.loads((folder / "whole" / "results.json").read_text())["seconds"]
    report = {
        "cores": args.cores,
        "seconds_until_20_steps_are_trained_and_saved": round(first, 1),
        "seconds_of_the_whole_demo": round(whole, 1),
        "seconds_of_the_whole_demo_with_programs_kept": round(again, 1),
        "seconds_by_part": {name: round(value, 1) for name, value in parts.items()},
        "peak_memory_gib": round(memory, 2),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
