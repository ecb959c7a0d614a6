"""launch/: the scripts say what they would do, and everything that they name exists."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

import main
from configs import base

LAUNCH = tiny.ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
FILES = sorted(path for path in LAUNCH.iterdir() if path.is_file())
BOUND = 900  # seconds after which something hangs, on the slowest of machines
WORDS = ["--config=configs/digits.py", "--config.sample.labels=3, 7"]
TPU = {
    "NAME": "ig",
    "ZONE": "zone-a",
    "TYPE": "v6e-16",
    "RUNTIME": "base",
    "WORKDIR": "/shared/a b",
}
LOCAL = {"PYTHON": sys.executable}


def call(script: str, *words: str, **environ: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        ["bash", LAUNCH / script, *words],
        cwd=tiny.ROOT,
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=BOUND,
    )


def plan(script: str, **environ: str) -> list[list[str]]:
    """The words of every command that DRY_RUN=1 prints."""
    done = call(script, *WORDS, DRY_RUN="1", **environ)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def remote(commands: list[list[str]]) -> list[str]:
    """What is run on the workers."""
    given = [word for words in commands for word in words if word.startswith("--command=")]
    return [word.removeprefix("--command=") for word in given]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_and_bash_find_nothing(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for command in ([shellcheck], ["bash", "-n"]):
        done = subprocess.run([*command, script], capture_output=True, text=True, timeout=BOUND)
        assert done.returncode == 0, done.stdout + done.stderr
    text = script.read_text()
    assert "set -euo pipefail" in text and "DRY_RUN" in text


def test_local_runs_one_process_with_the_words_as_they_are():
    assert plan("local.sh", **LOCAL) == [[sys.executable, "main.py", *WORDS]]


def test_local_gives_each_of_several_its_id_and_one_port():
    commands = plan("local.sh", PROCESSES="3", **LOCAL)
    (port,) = {word for words in commands for word in words if word.startswith("--coordinator=")}
    assert re.fullmatch(r"--coordinator=localhost:\d+", port)
    for i, words in enumerate(commands):
        job = [port, "--num_processes=3", f"--process_id={i}"]
        head = ["env", f"JAX_LOCAL_DEVICE_IDS={i}", sys.executable, "main.py"]
        assert words == [*head, *WORDS, *job]
    assert len(commands) == 3


def test_the_pod_is_made_filled_and_started():
    commands = plan("tpu_pod.sh", SPOT="1", **TPU)
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    what = ["--zone=zone-a", "--accelerator-type=v6e-16", "--runtime-version=base", "--spot"]
    assert commands[0] == [*tpu, "create", "ig", *what]
    assert [words[0] for words in commands] == ["gcloud", "tar", "gcloud", "gcloud", "gcloud"]
    assert all("--worker=all" in words for words in commands[2:])
    install, start = remote(commands)
    assert "-r requirements.txt 'jax[tpu]'" in install
    run = start[start.index("main.py") : start.index(">>run.log")]
    assert shlex.split(run) == ["main.py", *WORDS, "--workdir=/shared/a b"]
    for line in (install, start):
        done = subprocess.run(["bash", "-n", "-c", line], capture_output=True, timeout=BOUND)
        assert done.returncode == 0, done.stderr


def test_a_bucket_is_mounted_and_a_queue_asked():
    commands = plan("tpu_pod.sh", QUEUED="1", **TPU | {"WORKDIR": "gs://bucket-a/runs/xl"})
    create = ["queued-resources", "create", "ig", "--zone=zone-a", "--node-id=ig"]
    assert commands[0][3:8] == create and "--spot" not in commands[0]
    _, mount, start = remote(commands)
    assert "gcsfuse --implicit-dirs bucket-a bucket" in mount
    assert " --workdir=../bucket/runs/xl >>run.log" in start


def test_slurm_starts_a_task_for_each_gpu_and_queues_again():
    (words,) = plan("slurm.sbatch", WORKDIR="/shared/a b", **LOCAL)
    assert words[:1] + words[2:] == [
        "srun",
        sys.executable,
        "main.py",
        *WORDS,
        "--workdir=/shared/a b",
    ]
    options = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    given = dict(option.split("=") for option in options if "=" in option)
    assert given["--ntasks-per-node"] == given["--gpus-per-node"]
    assert "--requeue" in options and given["--signal"].startswith("B:USR1@")


@pytest.mark.parametrize(
    ("script", "environ", "words", "sentence"),
    [
        ("local.sh", LOCAL, [], "error: nothing to run: give what follows python main.py"),
        ("local.sh", LOCAL | {"PROCESSES": "two"}, WORDS, "error: PROCESSES=two: must be a number"),
        ("local.sh", {"PYTHON": "/nowhere"}, WORDS, "error: PYTHON=/nowhere: not found"),
        ("tpu_pod.sh", TPU | {"ZONE": ""}, WORDS, "error: ZONE is not set"),
        ("tpu_pod.sh", TPU, [], "error: nothing to run"),
        ("slurm.sbatch", LOCAL, WORDS, "error: WORKDIR is not set"),
        ("slurm.sbatch", {"WORKDIR": "/a"}, [], "error: nothing to run"),
    ],
)
def test_a_missing_setting_is_one_sentence(script, environ, words, sentence):
    done = call(script, *words, **{"DRY_RUN": "1", "WORKDIR": "", **environ})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1


def test_a_bucket_without_a_folder_is_told():
    done = call("tpu_pod.sh", *WORDS, DRY_RUN="1", **TPU | {"WORKDIR": "gs://bucket"})
    assert done.returncode == 2 and "name a folder of the bucket" in done.stderr


def job() -> dict:
    service, found = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    assert service["metadata"]["name"] == found["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"]["job-name"] == found["metadata"]["name"]
    return found


def test_the_pods_are_as_many_as_the_processes():
    spec = job()["spec"]
    pod = spec["template"]["spec"]
    environ = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environ["JAX_NUM_PROCESSES"])
    assert environ["JAX_COORDINATOR_ADDRESS"].startswith(f"{job()['metadata']['name']}-0.")
    assert "JAX_PROCESS_ID" in environ and pod["terminationGracePeriodSeconds"] >= 60


def known(field: str) -> bool:
    """Whether a dotted field is one of base.py, or lies in a part that each config fills itself."""
    config = base.get_config().to_dict()
    for name in field.split("."):
        if name not in config:
            return field.startswith("data.source.")
        config = config[name]
    return True


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_every_flag_field_and_config_that_is_named_exists(file):
    text = file.read_text()
    fields = re.findall(r"--config\.([\w.]+)", text)
    assert [field for field in fields if not known(field)] == []
    configs = set(re.findall(r"configs/\w+\.py", text))
    assert [config for config in configs if not (tiny.ROOT / config).exists()] == []
    commands = re.findall(r"(?:main\.py|launch/\w+\.\w+|local\.sh|tpu_pod\.sh)((?: +-\S+)+)", text)
    given = [flag for command in commands for flag in re.findall(r"--(\w+)(?=[= ]|$)", command)]
    given += re.findall(r"--(\w+_\w+)", text)  # other programs write hyphens
    assert [flag for flag in given if flag not in main.FLAGS] == []
    names = set(re.findall(r"launch/(\w+\.\w+)", text))
    assert [name for name in names if not (LAUNCH / name).exists()] == []


FAKE = """#!/bin/sh
[ "$1" = -c ] && exec {python} "$@"
trap 'echo stopped; exit 3' TERM
echo started
while true; do sleep 0.1; done
"""


def test_local_hands_signals_on_and_ends_as_its_processes_do(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    script = subprocess.Popen(
        ["bash", LAUNCH / "local.sh", *WORDS],
        env=os.environ | {"PYTHON": str(fake), "PROCESSES": "2"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert [script.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        script.send_signal(signal.SIGTERM)
        out, _ = script.communicate(timeout=BOUND)
    finally:
        script.kill()
    assert out == "stopped\n" * 2 and script.returncode == 3


SRUN = """#!/bin/sh
trap 'echo saved; exit 0' TERM
echo $$ > srun.pid
echo "$@"
while true; do sleep 0.1; done
"""
SCANCEL = """#!/bin/sh
echo scancel "$@"
kill -TERM "$(cat srun.pid)"
"""


def test_slurm_out_of_time_saves_first_and_then_queues_again(tmp_path):
    programs = {"srun": SRUN, "scancel": SCANCEL, "scontrol": '#!/bin/sh\necho scontrol "$@"\n'}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "main.py").touch()
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "WORKDIR": "/a"}
    script = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", *WORDS],
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "main.py" in script.stdout.readline()
        script.send_signal(signal.SIGUSR1)
        out, _ = script.communicate(timeout=BOUND)
    finally:
        script.kill()
    assert out.splitlines() == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]
    assert script.returncode == 0


@pytest.mark.slow
def test_local_starts_two_processes_that_meet():
    done = call("local.sh", WORDS[0], "--dry_run", PROCESSES="2", **LOCAL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters") >= 1
