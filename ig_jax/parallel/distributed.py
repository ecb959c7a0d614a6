"""Several processes as one job: how they find each other, and how they end when one is lost.

A job is as many processes as there are hosts (TPU) or GPUs, all running the same command. They meet
at the coordinator, an address on which process 0 listens; `jax.devices()` are then those of all.
A laptop or a single host needs nothing, and nothing is started there.

A process that ends without the others leaves them waiting in a collective, so whatever ends one
ends all, within `HEARTBEAT` seconds: no process goes through jax's orderly shutdown after an error,
which would wait for the dead. jax itself aborts (SIGABRT) where it notices a loss first, and where
the processes never meet, hence the handler.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import jax

from ig_jax.errors import UserError

LOST = 75  # exit status after a lost process: sysexits' "temporary failure, try again"
PATIENCE = 300  # seconds to meet: hosts install, load and mount at different speeds
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as lost
PARTING = 2.0  # seconds in which processes with the same mistake can all tell it
VARIABLES = {  # flag -> environment variable; jax itself reads only the first
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
_LOSS = re.compile(
    r"Gloo .*failed|NCCL.*remote|by peer|^UNAVAILABLE|^DEADLINE_EXCEEDED"
    r"|coordination ?service|heartbeat|barrier",
    re.IGNORECASE | re.DOTALL,
)
_handler = None  # what C calls; kept here, because C does not keep it alive


@dataclass(frozen=True)
class Start:
    """The way in which one process joins its job.

    `method` is jax's name for a platform that it asks by itself, "deactivate" where everything is
    specified, None where it tries them all. `local_devices` are the GPUs of this process, as
    numbers among those it sees; None: all.
    """

    source: str
    method: str | None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: tuple[int, ...] | None = None


def detect_job(environ: Mapping[str, str], flags: Mapping[str, str | int | None]) -> Start | None:
    """Detects how this process joins its job, from the flags in `VARIABLES` and the environment.

    The environment as it is after `import jax`; None: the process is alone.

    Flags count before variables, both before Slurm, TPU and Kubernetes.

    Raises:
      UserError: some of coordinator, number and id are missing, or one is not what it should be.
    """
    values = {flag: environ.get(name) for flag, name in VARIABLES.items()}
    values |= {flag: value for flag, value in flags.items() if value is not None}
    values = {flag: str(value) for flag, value in values.items() if value not in (None, "")}
    if values:
        return _explicit(values)
    return _slurm(environ) or _tpu(environ) or _kubernetes(environ)


def _explicit(values: Mapping[str, str]) -> Start | None:
    numbers = {flag: values[flag] for flag in ("num_processes", "process_id") if flag in values}
    for flag, value in numbers.items():
        if not value.isdecimal():
            raise UserError(f"--{flag}={value} ({VARIABLES[flag]}): must be a number from 0")
    if numbers.get("num_processes") == "1" and int(numbers.get("process_id", 0)) == 0:
        return None
    for flag in VARIABLES.keys() - values.keys():
        stated = ", ".join(f"--{f}={values[f]}" for f in VARIABLES if f in values)
        raise UserError(
            f"{stated} without --{flag} ({VARIABLES[flag]}): give all three, or none of them"
        )
    count, process = int(values["num_processes"]), int(values["process_id"])
    if not process < count:
        raise UserError(f"--process_id={process}: must be below --num_processes={count}")
    if not re.fullmatch(r".+:\d+", values["coordinator"]):
        raise UserError(f"--coordinator={values['coordinator']}: write host:port of process 0")
    return Start("flags", "deactivate", values["coordinator"], count, process)


def _slurm(environ: Mapping[str, str]) -> Start | None:
    """A task of srun; the batch script itself is one process, whatever was allocated."""
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    # node[007-009,012],other -> node007
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ["SLURM_STEP_NODELIST"])
    host = first[1] + (first[2] or "")
    port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096  # the same in all tasks, rarely taken
    return Start(
        "Slurm",
        "deactivate",
        f"{host}:{port}",
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_PROCID"]),
        _share_of_gpus(environ),
    )


def _share_of_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """This task's part of the node's GPUs, where Slurm shows every task all of them."""
    visible = len([g for g in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g])
    tasks = int(re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    if visible <= 1 or tasks == 1 or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    if visible % tasks:
        raise UserError(
            f"{tasks} Slurm tasks cannot share {visible} GPUs of a node equally: "
            "start one task for each GPU (--ntasks-per-node)"
        )
    share = visible // tasks
    first = int(environ["SLURM_LOCALID"]) * share
    return tuple(range(first, first + share))


def _tpu(environ: Mapping[str, str]) -> Start | None:
    """A worker of a slice, or of several slices."""
    if "TPU_ML_PLATFORM" not in environ:  # set by `import jax` where it sees chips and libtpu
        return None
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if environ.get("TPU_PROCESS_ADDRESSES_PATH"):
        return Start("TPU", "gketpu")
    if workers is not None:
        alone = "," not in workers and int(environ.get("MEGASCALE_NUM_SLICES", 1)) == 1
        return None if alone else Start("TPU", "gketpu")
    if "TPU_SKIP_MDS_QUERY" in environ:  # its owner says that there is no metadata server
        return None
    return Start("TPU", "gcetpu")  # only the metadata server knows; a single host is a job of one


def _kubernetes(environ: Mapping[str, str]) -> Start | None:
    if "TPU_ML_PLATFORM" in environ or "KUBERNETES_SERVICE_HOST" not in environ:
        return None
    return Start("Kubernetes", None) if "JOB_COMPLETION_INDEX" in environ else None


def start(
    flags: Mapping[str, str | int | None], patience: int = PATIENCE, heartbeat: int = HEARTBEAT
) -> None:
    """Joins the job that `detect` finds, if any; before anything asks jax for devices.

    Args:
      flags: see `detect`.
      patience: seconds to wait for the other processes.
      heartbeat: see `HEARTBEAT`.

    Raises:
      UserError: see `detect`; or the processes cannot meet. Where jax aborts instead of raising,
        the same is said on standard error, and the exit status is 2.
    """
    job = detect_job(os.environ, flags)
    if job is None:
        return
    if job.process_id == 0 and job.coordinator is not None:
        _require_free(job)
    _on_abort(2, _cannot_meet(job, "jax's reason is above"))
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.num_processes,
            job.process_id,
            local_device_ids=job.local_devices,
            cluster_detection_method=job.method,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(_cannot_meet(job, reason)) from error
    _on_abort(LOST, lost("jax's reason is above"))


def require_devices() -> None:
    """Raises UserError where jax has no device to start on, as where JAX_PLATFORMS names none."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for a missing cuda
        if is_loss(error):
            raise
        named = jax.config.jax_platforms
        values = str(error).split("\n")[0].split(" (set JAX_PLATFORMS")[0]
        raise UserError(
            f"{f'JAX_PLATFORMS={named}' if named else 'this machine'}: jax cannot start there "
            f"({values or 'it has no such backend'}); "
            "unset it to use what this machine has, or install the jax for it, such as "
            'pip install "jax[cuda13]" or "jax[tpu]"'
        ) from error


def _require_free(job: Start) -> None:
    """Raises UserError if the coordinator's port is taken: jax may crash on it."""
    address = ("", int(job.coordinator.rsplit(":", 1)[1]))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(address, family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UserError(_cannot_meet(job, error.strerror)) from error


def _cannot_meet(job: Start, reason: str) -> str:
    if job.coordinator is None:
        return (
            f"the processes of this job cannot meet, as found by {job.source} ({reason}): give "
            "--coordinator=host:port, --num_processes and --process_id; --num_processes=1 if alone"
        )
    return (
        f"process {job.process_id} cannot meet the other {job.num_processes - 1} of its job at "
        f"{job.coordinator} ({reason}): check that {job.num_processes} were started, each with "
        "another id, all with this address, and that its port is free and can be reached"
    )


def lost(reason: str) -> str:
    """The message for the loss of another process."""
    return (
        f"another process of this job ended or cannot be reached ({reason}); nothing saved is "
        "lost: start the job again and it goes on from the newest checkpoint"
    )


def is_loss(error: BaseException | None) -> bool:
    """Returns whether an error, or one that it came from, says that another process is gone."""
    if error is None:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError) and _LOSS.search(str(error)):
        return True
    return is_loss(error.__cause__ or error.__context__)


def several() -> bool:
    """Returns whether this process is one of several."""
    return jax.distributed.is_initialized()


def leave(status: int) -> NoReturn:
    """Ends this process; as one of a job without waiting for the others, who then end too."""
    if not several():
        sys.exit(status)
    _on_abort(status, "")
    time.sleep(PARTING)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _on_abort(status: int, sentence: str) -> None:
    """Says a sentence and ends with a status, instead of dumping core, when jax aborts."""
    global _handler

    def values(signal_number: int) -> None:
        del signal_number
        # Not through sys.stderr, which the aborted thread may hold.
        os.write(2, f"error: {sentence}\n".encode() if sentence else b"")
        os._exit(status)

    # Python's own handlers wait for the main thread, which may be inside a collective for ever.
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(values)
    set_handler: Callable = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(signal.SIGABRT, ctypes.cast(_handler, ctypes.c_void_p))
