"""Kills a training run again and again; it must end with the bits of one that was left alone.

  python tests/helpers/chaos.py [--kills=100] [--config=tests/helpers/tiny.py]  # 6 minutes, 2 cores
  python tests/helpers/chaos.py --minutes=120 --every=60                        # a soak

Starts main.py, waits a random time, kills one of its processes with SIGKILL, and starts the same
command again. Waiting times are exponential, so every moment of a run's life is as likely as any
other: reading, compiling, steps; every third kill waits for the next save and falls into it. In
the end SIGINT and SIGTERM each stop a run of one process once, and an unbroken run of as many steps
follows.

A soak goes on for a time, whatever its steps, and tells how memory and open files changed over the
longest segments without a kill, the unbroken run's among them. Its learning rate must not depend
on train.steps, for the unbroken run has fewer.

Every run is forked from this process, which imports what they need once and never starts jax
before the last of them has ended: each is what a shell would have run but for those seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import runpy
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from places import ROOT

# ruff: noqa: E402, it finds ig_jax beside its folder
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from jobs import SAMPLING, Process, Run
from ml_collections import ConfigDict

from ig_jax import experiment
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.config import run_config
from ig_jax.monitoring import metric_writer

CACHE = "JAX_COMPILATION_CACHE_DIR"
PATIENCE = 600.0  # seconds until the next save
SHARE = 3  # one kill of so many falls into a save
SAVES_PER_KILL = 2
SETTLING = 60.0  # seconds after a start
MACHINE = ("second", "memory", "flops", "mfu")  # in names of metrics that are no result
ENDLESS = 10**9  # steps


@dataclass
class Tally:
    """What happened. Steps repeated are those told of since the last finished save."""

    kills: int = 0
    inside_a_save: int = 0
    before_the_first_save: int = 0
    before_the_first_step: int = 0  # of that start
    most_steps_repeated: int = 0
    slowest_to_follow: float | None = None  # seconds until the other processes had ended

    def count(self, run: Run) -> None:
        self.kills += 1
        self.inside_a_save += run.saving() and run.stepping()
        self.before_the_first_save += run.saved() == 0
        self.before_the_first_step += not run.stepping()
        self.most_steps_repeated = max(self.most_steps_repeated, run.told() - run.saved())


def hold_inside_a_save(run: Run, victim: Process, moment: random.Random) -> None:
    """Stops the victim while a save is half written."""
    while True:
        # What an earlier kill left behind is cleared before the first step.
        run.wait(lambda: run.saving() and run.stepping(), PATIENCE)
        time.sleep(moment.uniform(0, 0.1))
        os.kill(victim.pid, signal.SIGSTOP)
        if run.saving():
            return
        os.kill(victim.pid, signal.SIGCONT)


def kill_once(run: Run, moment: random.Random, every: float, saves: float, tally: Tally) -> None:
    """Starts the run and kills it at a random moment, or soon after so many steps of saves."""
    run.start()
    victim = moment.choice(run.processes)
    later = time.monotonic() + moment.expovariate(1 / every)
    latest, slip = run.resumed_at + saves, moment.uniform(0, 0.3)
    if tally.kills == 0:  # before any save
        run.wait(run.stepping, PATIENCE)
    else:
        run.wait(lambda: time.monotonic() >= later or run.saved() >= latest)
        if run.saved() >= latest:
            time.sleep(slip)
    if tally.kills % SHARE == 1:
        hold_inside_a_save(run, victim, moment)
    run.kill(victim)
    seconds = run.follow()
    if len(run.processes) > 1:
        tally.slowest_to_follow = max(seconds, tally.slowest_to_follow or 0.0)
    tally.count(run)


def stop(run: Run, number: signal.Signals, moment: random.Random, steps: int) -> None:
    """Goes on to the next save, and asks the run to stop soon after."""
    run.start()
    run.wait(lambda: run.saved() > run.resumed_at, PATIENCE)
    os.kill(moment.choice(run.processes).pid, number)
    run.finish(
        f"{number.name}: saved step {{step}} of {steps} in {run.workdir}; "
        "run the same command again to go on"
    )


def finish(run: Run, steps: int) -> None:
    run.start()
    run.finish(f"trained: step {steps} of {steps} is saved in {run.workdir}")


def final_state(workdir: Path, settings: ConfigDict) -> tuple:
    """Every array of the newest checkpoint, where its data go on, and the checkpoints there are."""
    exp = experiment.experiment(run_config.parse(settings, devices=jax.device_count()))
    checkpoints = checkpoint_manager.Checkpoints(workdir, keep_last=settings.checkpoint.keep_last)
    step = checkpoints.latest_step()
    state = checkpoints.restore(step, exp.abstract_state)
    data = checkpoints.meta(step)["data"]
    checkpoints.close()
    return jax.device_get(jax.tree.leaves(state)), data, set(os.listdir(workdir / "checkpoints"))


def told(workdir: Path) -> list[dict]:
    """The metrics but for what the machine adds: rates, times, memory."""
    lines = metric_writer.read_metrics(workdir)
    return [{k: v for k, v in m.items() if not any(w in k for w in MACHINE)} for m in lines]


def equal(ours: Path, theirs: Path, settings: ConfigDict) -> bool:
    """Whether two runs ended with the same bits, having told the same."""
    (a, *rest), (b, *same) = final_state(ours, settings), final_state(theirs, settings)
    bits = all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))
    found = {
        "bits": bits,
        "data and checkpoints": rest == same,
        "metrics": told(ours) == told(theirs),
    }
    print("".join(f"{what} differ\n" for what, good in found.items() if not good), end="")
    for x, y in zip(told(ours), told(theirs), strict=False):
        if x != y:
            print(f"metrics at first: {sorted(set(x.items()) ^ set(y.items()), key=str)}")
            break
    return all(found.values())


def stretch(process: Process) -> dict[str, float] | None:
    """How memory and open files changed after the first minute; None if too little was seen."""
    seen = np.array([s for s in process.seen if s[0] > SETTLING])
    a_minute = int(60 / SAMPLING)
    if len(seen) < a_minute:
        return None
    seconds, resident, files = seen.T
    change = statistics.median(files[-a_minute:]) - statistics.median(files[:a_minute])
    return {
        "minutes": round((seconds[-1] - seconds[0]) / 60, 1),
        "mib": round(resident[-1], 1),
        "mib_per_hour": round(np.polyfit(seconds / 3600, resident, 1)[0], 2),
        "open_files_more": change,
    }


def stretches(runs: list[Run]) -> list[dict[str, float]]:
    """The three longest."""
    found = [stretch(process) for run in runs for process in run.past]
    return sorted(filter(None, found), key=lambda s: -s["minutes"])[:3]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=0.0, help="a soak: kill for so long")
    parser.add_argument("--every", type=float, default=5.0, help="mean seconds to a kill")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workdir", type=Path, help="a new folder, kept; otherwise a temporary one"
    )
    parser.add_argument("--config", default=str(ROOT / "configs/digits.py"))
    parser.add_argument("--no_compare", action="store_true", help="leave out the unbroken run")
    args = parser.parse_args()
    if args.workdir and args.workdir.exists():
        parser.error(f"--workdir={args.workdir}: is there already; name a new folder")
    return args


def overrides(settings: ConfigDict, steps: int) -> dict[str, int]:
    """Two programs of steps between saves: metrics are told more often than saved."""
    programs = settings.train.steps_per_dispatch
    return {
        "train.steps": steps,
        "checkpoint.every_steps": 2 * programs,
        "log.every_steps": programs,
    }


def torment(run: Run, args: argparse.Namespace, steps: int, save_every: int) -> Tally:
    """Kills the run as often, or for as long, as asked; then stops it, and lets it finish."""
    tally, moment, begun = Tally(), random.Random(args.seed), time.monotonic()
    saves = math.inf if args.minutes else save_every

    def over() -> bool:
        if args.minutes:
            return time.monotonic() - begun > 60 * args.minutes
        return tally.kills >= args.kills

    while not over():
        kill_once(run, moment, args.every, saves, tally)
        minutes = (time.monotonic() - begun) / 60
        print(
            f"{tally.kills} kills in {minutes:.1f} minutes: step {run.saved()} is saved", flush=True
        )
    # Several processes agree on a step to stop at only after seconds; test_processes.py stops them.
    for number in (signal.SIGINT, signal.SIGTERM) if args.processes == 1 else ():
        stop(run, number, moment, steps)
    if not args.minutes:
        finish(run, steps)
    return tally


def chaos(args: argparse.Namespace, place: Path) -> bool:
    """All of it, in the folder `place`; whether the runs were equal."""
    begun = time.monotonic()
    # A kill may fall into the writing of a compiled program, too: jax compiles such a one again.
    os.environ.setdefault(CACHE, str(place / "compiled"))
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    file, *variant = args.config.split(":")
    settings = runpy.run_path(file)["get_config"](*variant)
    save_every = overrides(settings, 1)["checkpoint.every_steps"]
    steps = ENDLESS if args.minutes else SAVES_PER_KILL * save_every * (args.kills + 3)

    def run(name: str, steps: int) -> Run:
        flags = [f"--config.{n}={value}" for n, value in overrides(settings, steps).items()]
        return Run([f"--config={args.config}", *flags], place / name, args.processes)

    runs = [run("killed", steps)]
    tally = torment(runs[0], args, steps, save_every)
    starts, reached = len(runs[0].past) // args.processes, runs[0].saved()
    same = None
    if not args.no_compare:
        runs.append(run("unbroken", reached))
        finish(runs[1], reached)
        same = equal(runs[0].workdir, runs[1].workdir, settings)
    report = asdict(tally) | {
        "save_every": save_every,
        "steps": reached,
        "starts": starts,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "equal": same,
        "jax": jax.__version__,
        "longest_stretches": stretches(runs),
    }
    print(json.dumps(report))
    compared = {True: "equals", False: "DIFFERS FROM", None: "was not compared with"}[same]
    print(
        f"{reached} steps with {tally.kills} kills ({tally.inside_a_save} inside a save) and "
        f"{starts} starts: the end {compared} that of an unbroken run"
    )
    return same is not False


if __name__ == "__main__":
    args = parse()
    # Not a context: a forked run would leave it, too.
    place = args.workdir.absolute() if args.workdir else Path(tempfile.mkdtemp(prefix="chaos_"))
    if not chaos(args, place):
        sys.exit(f"look into {place}")
    if not args.workdir:
        shutil.rmtree(place)
