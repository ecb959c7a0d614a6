"""Starting several processes, found by flags or surroundings; and how all end when one is lost."""

import os
import re
import signal
import socket
import subprocess
import sys

import jax
import pytest
import tiny

from ig_jax.errors import UserError
from ig_jax.parallel import distributed
from ig_jax.parallel.distributed import Start, detect_job

HEARTBEAT = 3
BOUND = 900  # seconds after which something hangs, on the slowest of machines
ENVIRON = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
FLAGS = {"coordinator": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}
SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
TPU = {"TPU_ML_PLATFORM": "JAX"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def told(coordinator: str, num_processes: int, process_id: int) -> Start:
    return Start("flags", "deactivate", coordinator, num_processes, process_id)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: "" for name in ENVIRON},
        {"JAX_NUM_PROCESSES": "1"},
        ENVIRON | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        SLURM | {"JAX_NUM_PROCESSES": "1"},
        {"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"},  # a batch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        TPU | {"TPU_WORKER_HOSTNAMES": "localhost"},
        TPU | {"TPU_SKIP_MDS_QUERY": "1"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},  # without chips or without libtpu
        TPU | POD | {"TPU_WORKER_HOSTNAMES": "a", "JOB_COMPLETION_INDEX": "0"},
        POD,
    ],
)
def test_one_process_starts_nothing(environ):
    assert detect_job(environ, {}) is None


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        ({}, FLAGS),
        (ENVIRON, {}),
        (ENVIRON | {"JAX_PROCESS_ID": "0"}, {"process_id": 3}),
        (SLURM | TPU | ENVIRON, dict.fromkeys(FLAGS)),
    ],
)
def test_flags_count_before_variables_and_both_before_the_surroundings(environ, flags):
    assert detect_job(environ, flags) == told("10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"coordinator": "a:1"}, "--coordinator=a:1 without --"),
        ({"coordinator": "a:1", "num_processes": 2}, r"without --process_id \(JAX_PROCESS_ID\)"),
        ({"num_processes": 2, "process_id": 1}, "--num_processes=2, --process_id=1 without --coor"),
        ({"process_id": 0}, "--process_id=0 without --"),
        (FLAGS | {"process_id": 4}, "--process_id=4: must be below --num_processes=4"),
        (FLAGS | {"process_id": -1}, "--process_id=-1 .*: must be a number from 0"),
        (FLAGS | {"num_processes": "two"}, "--num_processes=two .*: must be a number from 0"),
        (FLAGS | {"num_processes": 1}, "--process_id=3: must be below --num_processes=1"),
        (FLAGS | {"coordinator": "10.0.0.1"}, "--coordinator=10.0.0.1: write host:port"),
    ],
)
def test_a_wrong_or_incomplete_start_is_one_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        detect_job({}, flags)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,other", "node7"),
        ("node[007-008]", "node007"),
        ("node[03,07-09],other", "node03"),
        ("gpu-a-[1-2]", "gpu-a-1"),
    ],
)
def test_tasks_of_slurm_meet_at_the_first_node(nodes, host):
    found = detect_job(SLURM | {"SLURM_STEP_NODELIST": nodes}, {})
    port = 61440 + 5000 - 4096
    assert found == Start("Slurm", "deactivate", f"{host}:{port}", 16, 11, (3,))


@pytest.mark.parametrize(
    ("change", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": "5"}, None),  # Slurm has bound the task to its GPU
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, (6, 7)),
        ({"JAX_LOCAL_DEVICE_IDS": "1"}, None),  # jax reads it
    ],
)
def test_tasks_of_slurm_share_the_gpus_that_they_see(change, devices):
    assert detect_job(SLURM | change, {}).local_devices == devices


def test_gpus_that_cannot_be_shared_are_told():
    with pytest.raises(UserError, match="3 Slurm tasks cannot share 8 GPUs of a node equally"):
        detect_job(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3"}, {})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, Start("TPU", "gketpu")),
        (TPU | {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, Start("TPU", "gketpu")),
        (TPU | {"TPU_PROCESS_ADDRESSES_PATH": "/addresses"}, Start("TPU", "gketpu")),
        (
            TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            Start("TPU", "gketpu"),
        ),
        (TPU, Start("TPU", "gcetpu")),
        (POD | {"JOB_COMPLETION_INDEX": "1"}, Start("Kubernetes", None)),
    ],
)
def test_jax_is_asked_where_only_the_platform_knows(environ, expected):
    assert detect_job(environ, {}) == expected


def test_the_names_of_platforms_are_those_of_jax():
    from jax._src.clusters import ClusterEnv

    assert {"gketpu", "gcetpu"} <= {cluster.name for cluster in ClusterEnv._cluster_types}


GLOO = "UNKNOWN: Gloo all-reduce failed: [pair.cc:547] Connection closed by peer [10.0.0.1]:4"
NCCL = "INTERNAL: NCCL operation failed: remote process exited or there was a network error"
BARRIER = "DEADLINE_EXCEEDED: Barrier timed out. Id: save"


def test_losses_are_told_from_other_errors():
    lost = [jax.errors.JaxRuntimeError(text) for text in (GLOO, NCCL, BARRIER)]
    assert all(distributed.is_loss(error) for error in lost)
    wrapped = ValueError("cannot save")
    wrapped.__cause__ = lost[0]
    assert distributed.is_loss(wrapped)
    memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")
    assert not any(distributed.is_loss(e) for e in (memory, ValueError(GLOO), ValueError()))


# main.py, with a loop of sums over all devices in place of a run.
PROGRAM = """
import functools, sys, time
import jax, jax.numpy as jnp
from absl import app
from ig_jax import cli, errors, modes
from ig_jax.parallel import distributed

def loop(*args, **kwargs):
    total = jax.jit(lambda x: x.sum(), out_shardings=None)
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((jax.device_count(),), ("d",), (jax.sharding.AxisType.Auto,)),
        jax.sharding.PartitionSpec("d"))
    ones = jax.jit(lambda: jnp.ones(jax.device_count()), out_shardings=sharding)()
    assert total(ones) == 4, total(ones)
    print("ready", flush=True)
    if sys.argv[-1] == "--dry_run" and jax.process_index() == 0:
        raise errors.UserError("a mistake of process 0")
    while True:
        HERE
        total(ones).block_until_ready()

distributed.start = functools.partial(distributed.start, heartbeat=BEAT)
modes.run = loop
app.run(cli.main, flags_parser=cli.parse_flags)
"""


def free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("localhost", 0))
        return holder.getsockname()[1]


# What main.py does first, alone.
MEETING = """
import sys
from ig_jax import errors
from ig_jax.parallel import distributed
try:
    distributed.start({"coordinator": sys.argv[1], "num_processes": 2, "process_id": 0}, patience=1)
except errors.UserError as error:
    sys.exit(f"error: {error}")
"""


def launch(program: str, flags: list[str]) -> list[subprocess.Popen]:
    """Both processes of a job with two devices each."""
    program = program.replace("BEAT", str(HEARTBEAT))
    job = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    command = [sys.executable, "-c", program, "--config=tests/helpers/tiny.py", *job]
    return [started([*command, f"--process_id={i}", *flags]) for i in range(2)]


def started(command: list[str]) -> subprocess.Popen:
    environ = os.environ | {"PYTHONPATH": str(tiny.ROOT), "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tiny.ROOT, env=environ, **pipes)


@pytest.fixture
def job():
    """Starts jobs, and ends what a failing test leaves running."""
    processes = []

    def start(here: str, *flags: str) -> list[subprocess.Popen]:
        processes.extend(launch(PROGRAM.replace("HERE", here), list(flags)))
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_until_ready(processes: list) -> None:
    for process in processes:
        for line in process.stdout:
            if line == "ready\n":
                break
        else:
            raise AssertionError(process.communicate(timeout=BOUND)[1])


LOSS = (
    r"error: another process of this job ended or cannot be reached \(.+\); nothing saved is lost: "
    "start the job again and it goes on from the newest checkpoint\n"
)
IDLE, BUSY = "time.sleep(BOUND)".replace("BOUND", str(BOUND)), "pass"
slow = pytest.mark.slow


@slow
@pytest.mark.parametrize(
    ("victim", "doing"),
    [
        (1, IDLE),  # jax notices first, and aborts
        (0, BUSY),
        (0, IDLE),
        (1, BUSY),  # gloo notices
    ],
)
def test_when_a_process_is_killed_the_other_says_so_and_ends_in_time(job, victim, doing):
    processes = job(doing)
    wait_until_ready(processes)
    processes[victim].send_signal(signal.SIGKILL)
    survivor = processes[1 - victim]
    _, err = survivor.communicate(timeout=BOUND)
    assert survivor.returncode == distributed.LOST, err
    assert len(re.findall(LOSS, err)) == 1, err
    assert "Traceback" not in err  # jax's own words may stand before and after


@slow
def test_a_mistake_that_only_one_process_makes_ends_all(job):
    processes = job(BUSY, "--dry_run")
    wait_until_ready(processes)
    said = [process.communicate(timeout=BOUND)[1] for process in processes]
    assert [p.returncode for p in processes] == [2, distributed.LOST], said
    assert "error: a mistake of process 0\n" in said[0] and re.search(LOSS, said[1])


def meet(port: int) -> tuple[int, str]:
    """Exit status and standard error of a process that waits a second for another one."""
    process = started([sys.executable, "-c", MEETING, f"localhost:{port}"])
    try:
        _, err = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    return process.returncode, err


@pytest.mark.slow
def test_a_process_that_meets_no_other_says_so():
    status, err = meet(free_port())
    assert status == 2, err
    assert "error: process 0 cannot meet the other 1 of its job at localhost:" in err
    assert "check that 2 were started" in err and "Traceback" not in err


def test_a_port_in_use_is_told():
    with socket.socket(socket.AF_INET6) as holder:
        holder.bind(("::", 0))
        holder.listen()
        _, err = meet(holder.getsockname()[1])
    assert "error: process 0 cannot meet" in err and "its port is free" in err, err
