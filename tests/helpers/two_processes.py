"""Two processes of two devices each train, get killed, get stopped, sample, judge.

  python tests/helpers/two_processes.py trained|judged|prepared FOLDER

Leaves a workdir, and what was seen, in the folder for test_processes.py to look at.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import compiled
import cpu_devices

# ruff: noqa: E402, jax reads this when it is imported
compiled.quickly()

from jobs import ROOT, Run, end_with_parent

PATIENCE = 1500.0


def judged(folder: Path) -> None:
    use(folder, "evaluate")


def prepared(folder: Path) -> None:
    """What the folder's own config asks for."""
    run = Run([f"--config={folder / 'settings.py'}", "--mode=prepare"], folder / "two", 2)
    run.start()
    run.end()
    if any(process.status for process in run.processes):
        run.fail("--mode=prepare failed")


def use(folder: Path, mode: str) -> None:
    """Another mode in the workdir of the run."""
    run = Run(["--config=tests/helpers/tiny.py", f"--mode={mode}"], folder / "run", 2, log=mode)
    run.start()
    run.end()
    if any(process.status for process in run.processes):
        run.fail(f"--mode={mode} failed")


def trained(folder: Path) -> None:
    """Kills one of two, goes on as two and stops both by a signal to one, goes on as one."""
    endless = ["--config=tests/helpers/tiny.py", "--config.train.steps=100000"]
    run = Run(endless, folder / "run", 2)
    run.start()
    run.wait(lambda: run.saved() >= 6, PATIENCE)
    run.kill(run.processes[1])
    seen = {"seconds_to_follow": run.follow(), "status": run.processes[0].status}
    run.start()
    run.wait(lambda: run.saved() >= run.resumed_at + 6, PATIENCE)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    run.finish(
        f"SIGTERM: saved step {{step}} of 100000 in {run.workdir}; run the same command again to "
        "go on"
    )
    seen["stopped_at"] = run.saved()
    seen["end"] = run.saved() + 8
    last = ["--config=tests/helpers/tiny.py", f"--config.train.steps={seen['end']}"]
    alone = Run(last, run.workdir, 1, log="alone")
    alone.start()
    alone.finish(f"trained: step {seen['end']} of {seen['end']} is saved in {run.workdir}")
    use(folder, "sample")
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    stories = {f.__name__: f for f in (trained, judged, prepared)}
    end_with_parent()
    os.chdir(ROOT)
    os.environ["XLA_FLAGS"] = cpu_devices.xla_flags(2)  # of each process
    stories[sys.argv[1]](Path(sys.argv[2]))
