"""Training runs as a shell would start them, in one process or several, to be killed and stopped.

Each process is forked from this one, which has imported what they need and must never start JAX
before the last of them has ended.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from places import ROOT

# ruff: noqa: E402, it finds ig_jax beside its folder
sys.path.insert(0, str(ROOT))

import commands
import sklearn.datasets  # noqa: F401, before the first fork, as is tensorboardX
import tensorboardX  # noqa: F401

from ig_jax.monitoring import metric_writer  # noqa: F401, before the first fork

ALONE = 900.0  # seconds; the others of a killed process end after about 60, on a slow machine later
SAMPLING = 5.0  # seconds
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_parent() -> None:
    """This process gets a SIGKILL when its parent ends, however that ends; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Process:
    """One process of a run, its logs, and what was seen of it: seconds, MiB, open files."""

    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)
    seen: list[tuple[float, float, int]] = field(default_factory=list)
    status: int | None = None

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def watch(self) -> None:
        """Looks at memory and open files, now and then."""
        seconds = time.monotonic() - self.started
        if seconds < len(self.seen) * SAMPLING:
            return
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        resident = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
        if resident:  # it has just ended otherwise
            files = len(os.listdir(f"/proc/{self.pid}/fd"))
            self.seen.append((seconds, resident[0] / 1024, files))

    def said(self, stream: str) -> str:
        return self.log.with_suffix(f".{stream}").read_text()


class Run:
    """One command of main.py in one workdir, started as often as it takes."""

    def __init__(self, words: list[str], workdir: Path, processes: int, log: str = "logs"):
        self.words = [*words, f"--workdir={workdir}"]
        self.workdir, self.count = workdir, processes
        self.logs = workdir.with_name(f"{workdir.name}_{log}")
        self.logs.mkdir(parents=True)
        self.past: list[Process] = []

    def saved(self) -> int:
        """The newest finished checkpoint's step."""
        folder = self.workdir / "checkpoints"
        return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)

    def saving(self) -> bool:
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))

    def told(self) -> int:
        """The step of the newest line of metrics.jsonl."""
        return max((m["step"] for m in metric_writer.read_metrics(self.workdir)), default=0)

    def _lines(self) -> int | None:
        """Which file metrics.jsonl is: every start writes another."""
        file = self.workdir / metric_writer.METRICS_FILE
        return file.stat().st_ino if file.exists() else None

    def stepping(self) -> bool:
        """Whether steps have been done since the start."""
        return self._lines() != self._lines_at_start and self.told() > self.resumed_at

    def start(self) -> None:
        self.resumed_at, self._lines_at_start = self.saved(), self._lines()
        words, self.processes = self.words, []
        if self.count > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            words = [*words, f"--coordinator=localhost:{port}", f"--num_processes={self.count}"]
        for i in range(self.count):
            number = len(self.past)
            flags = [f"--process_id={i}"] if self.count > 1 else []
            pid = os.fork()
            if not pid:
                end_with_parent()
                commands.become([*words, *flags], self.logs, number)
            self.processes.append(Process(pid, self.logs / str(number)))
            self.past.append(self.processes[-1])

    def wait(self, condition: Callable[[], bool], within: float = math.inf) -> None:
        """Returns as soon as the condition holds; no process may end before."""
        deadline = time.monotonic() + within
        while not condition():
            for process in self.processes:
                if process.ended():
                    self.fail(f"a process ended with status {process.status} by itself")
                process.watch()
            if time.monotonic() > deadline:
                self.fail(f"nothing was saved within {within:.0f} seconds")
            time.sleep(0.002)

    def fail(self, what: str) -> None:
        for process in self.processes:
            if not process.ended():
                os.kill(process.pid, signal.SIGKILL)
        said = "\n".join(process.said("err")[-2000:] for process in self.processes)
        raise RuntimeError(f"{self.workdir}: {what}:\n{said}")

    def kill(self, victim: Process) -> None:
        os.kill(victim.pid, signal.SIGKILL)
        while not victim.ended():
            time.sleep(0.001)
        if victim.status != -signal.SIGKILL:
            self.fail("it ended before it was killed")

    def end(self) -> float:
        """Waits until all processes have ended; the seconds it took."""
        since = time.monotonic()
        while not all([process.ended() for process in self.processes]):
            for process in self.processes:
                if not process.ended():
                    process.watch()
            time.sleep(0.01)
        return time.monotonic() - since

    def finish(self, sentence: str) -> None:
        """Waits for the end, which must be a good one: `sentence`, {step} being the step saved."""
        self.end()
        lines = self.processes[0].said("out").splitlines()
        # A killed one leaves its lock, which the next one says that it takes over.
        left_out = ("[Gloo]", f"{self.workdir}: process ", "train.ema_decays: after ")
        out = [line for line in lines if not line.startswith(left_out)]
        if any(process.status for process in self.processes):
            self.fail(f"it ended with statuses {[process.status for process in self.processes]}")
        resuming = f"resuming {self.workdir} at step {self.resumed_at}"
        expected = [resuming] * (self.resumed_at > 0) + [sentence.format(step=self.saved())]
        if out != expected or self.saving():
            self.fail(f"it ended well but said {out}, not {expected}, or left half a save")

    def follow(self) -> float:
        """The other processes must notice that one was killed, end by themselves, and say why.

        Returns:
          The seconds that took.
        """
        others = [process for process in self.processes if not process.ended()]
        since = time.monotonic()
        while not all([process.ended() for process in others]):
            if time.monotonic() - since > ALONE:
                self.fail(f"one process was killed, others still ran {ALONE:.0f} seconds later")
            time.sleep(0.01)
        for process in others:
            if process.status == 0 or "error: " not in process.said("err"):
                self.fail(f"one was killed; another ended with {process.status} and no error")
        return time.monotonic() - since
