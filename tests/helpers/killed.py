"""Kills --mode=sample and --mode=evaluate twice each, lets them end; does both unbroken as well.

  python tests/helpers/killed.py FOLDER [--num=1000]

FOLDER holds `broken` and `unbroken`, two copies of a trained run of tests/helpers/tiny.py. Left in
it are what both made, and `kills.json`: the rows that were on the disk at every kill.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import compiled
import numpy as np

# ruff: noqa: E402, jax reads this when it is imported
compiled.quickly()

from jobs import ROOT, Run, end_with_parent

PATIENCE = 1500.0
PLACES = {"sample": "samples", "evaluate": "evaluations"}


def rows(workdir: Path, place: str) -> int:
    """Samples that are whole, so far."""
    found = [np.load(f, mmap_mode="r") for f in (workdir / place).glob("*/.*/done.npy")]
    return sum(int(done.sum()) for done in found)


def start(words: list[str], workdir: Path, log: str) -> Run:
    run = Run(words, workdir, 1, log=log)
    run.start()
    return run


def kill_twice(words: list[str], workdir: Path, mode: str, num: int) -> list[int]:
    """The rows that were there when it was killed, at about a fifth and three fifths of `num`."""
    found = []
    for share in (0.2, 0.6):
        run = start(words, workdir, f"{mode}_{share}")
        run.wait(lambda least=share * num: rows(workdir, PLACES[mode]) >= least, PATIENCE)
        run.kill(run.processes[0])
        found.append(rows(workdir, PLACES[mode]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, default=1000)
    args = parser.parse_args()
    end_with_parent()
    os.chdir(ROOT)
    kills = {}
    for mode in PLACES:
        words = ["--config=tests/helpers/tiny.py", f"--mode={mode}", "--config.evaluate.seeds=(0,)"]
        words += [f"--config.{mode}.num={args.num}"]
        kills[mode] = kill_twice(words, args.folder / "broken", mode, args.num)
        for workdir in (args.folder / "broken", args.folder / "unbroken"):
            run = start(words, workdir, f"{mode}_whole")
            run.end()
            if run.processes[0].status:
                run.fail(f"--mode={mode} failed")
    (args.folder / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    main()
