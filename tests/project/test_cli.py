"""The command line: what is printed, what is written, and that every mistake is one sentence.

Most cases run in this process, through the functions that `python main.py` is made of; a few start
the real program.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import jax
import pytest
import tiny
from tiers import slow_but

from configs import sit_xl
from ig_jax import experiment, modes
from ig_jax.config import run_config
from ig_jax.programs import dry_run

CONFIGS = sorted(
    str(path.relative_to(tiny.ROOT))
    for path in (tiny.ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "imagenet", "published", "sampling", "workdir")
)
TINY, DIGITS = "--config=tests/helpers/tiny.py", "--config=configs/digits.py"

# ml_collections reads a config file in a way that Python 3.12 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def trained():
    """A finished run, made before a test listens to what is printed."""
    return tiny.trained()


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `python main.py *arguments` in this process; gives status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return commands.run_here(list(arguments), monkeypatch), *capsys.readouterr()

    return run


def program(*arguments: str, cwd=tiny.ROOT) -> subprocess.CompletedProcess:
    """Runs the real program in a process of its own."""
    command = [sys.executable, str(tiny.ROOT / "main.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )


def assert_one_sentence(status: int, err: str, *parts: str) -> None:
    assert status == 2
    assert len(err) < 1000
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert "Traceback" not in err and "\\n" not in err, err
    for part in parts:
        assert part in err


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# Arguments, and what the sentence must hold.
MISTAKES = {
    "unknown_key": (
        [DIGITS, "--config.model.dept=3"],
        ["model.dept: unknown field", "did you mean 'depth'"],
    ),
    "unknown_section": (
        [DIGITS, "--config.modle.depth=3"],
        ["modle.depth: unknown field", "did you mean 'model'"],
    ),
    "key_like_no_other": (
        [DIGITS, "--config.model.zzz=3"],
        ["model.zzz: unknown field", "configs/base.py shows every field"],
    ),
    "key_below_a_number": ([DIGITS, "--config.model.depth.x=1"], ["model.depth.x: unknown field"]),
    "word_for_a_number": ([DIGITS, "--config.model.depth=deep"], ["config.model.depth", "'deep'"]),
    "fraction_for_a_number": (
        [DIGITS, "--config.model.depth=2.5"],
        ["config.model.depth", "'2.5'"],
    ),
    "number_for_a_flag": ([DIGITS, "--config.model.qk_norm=7"], ["config.model.qk_norm", "'7'"]),
    "number_for_a_section": ([DIGITS, "--config.model=3"], ["--config.model=3"]),
    "broken_rule": ([DIGITS, "--config.model.hidden_size=50"], ["model.hidden_size = 50: must be"]),
    "two_mistakes": (
        [DIGITS, "--config.train.steps=0", "--config.train.batch_size=0"],
        ["train."],
    ),
    "no_config": ([], ["--config is missing", "--config=configs/digits.py"]),
    "missing_file": (["--config=configs/nope.py"], ["--config=configs/nope.py", "configs/"]),
    "folder_for_a_file": (["--config=configs"], ["--config=configs"]),
    "argument_not_taken": ([f"{DIGITS}:large"], ["--config=configs/digits.py:large"]),
    "unknown_flag": ([DIGITS, "--stepz=3"], ["stepz"]),
    "bad_mode": ([DIGITS, "--mode=draw"], ["--mode=draw", "train|sample|evaluate|search|demo"]),
    "method_for_a_section": (
        [DIGITS, "--config.search.space.values.cfg.scale=3"],
        ["search.space.values.cfg.scale: cannot be set on the command line"],
    ),
    "below_a_text": ([DIGITS, "--config.model.name.x=1"], ["model.name.x: no such field"]),
    "index_of_a_number": ([DIGITS, "--config.seed[0]=1"], ["seed[0]: no such field"]),
    "value_of_many_digits": (
        [DIGITS, f"--config.seed={'9' * 5000}"],
        [f"flag --config.seed={'9' * 180}", "9... "],
    ),
    "bytes_for_a_flag": ([DIGITS, "--config.model.qk_norm=\udcff\x1b"], ["=\\udcff\\x1b"]),
    "text_for_a_section": ([DIGITS, "--config.optim.name={}"], ["optim.name = '{}': no such name"]),
    "stray_word": ([DIGITS, "train"], ["'train' is not a flag", "--mode="]),
}


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_on_the_command_line_is_told_in_one_sentence(call, arguments, parts):
    status, out, err = call(*arguments)
    assert_one_sentence(status, err, *parts)
    assert out == ""


@pytest.mark.parametrize(
    "text",
    [
        *("raise ValueError('broken here')", "import not_there", "def get_config(:"),
        *("def get_config(): raise TypeError('mine')", "def get_config(): return 3"),
    ],
)
def test_a_config_file_that_fails_says_what_failed_in_one_sentence(call, tmp_path, text):
    (tmp_path / "broken.py").write_text(text + "\n")
    status, _, err = call(f"--config={tmp_path}/broken.py")
    assert_one_sentence(status, err, "broken.py")


def test_a_config_file_that_returns_nothing_is_told(call, tmp_path):
    (tmp_path / "empty.py").write_text("def get_config(): pass\n")
    status, _, err = call(f"--config={tmp_path}/empty.py", "--verbosity=-3")
    assert status == 2
    assert f"error: --config={tmp_path}/empty.py: its get_config() returns nothing\n" in err


@pytest.mark.parametrize("mode", ["train", "demo"])
def test_a_workdir_below_a_file_is_refused_by_name(call, tmp_path, mode):
    (tmp_path / "file").touch()
    status, _, err = call(TINY, f"--workdir={tmp_path}/file/run", f"--mode={mode}")
    assert_one_sentence(status, err, f"{tmp_path}/file/run: cannot be written to", "name another")


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_without_a_checkpoint_there_is_nothing_to_sample(call, tmp_path, mode, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    status, _, err = call(TINY, f"--workdir={tmp_path}", f"--mode={mode}")
    assert_one_sentence(status, err, str(tmp_path), "--mode=train")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("mode", slow_but(["train"], ["train", "sample", "evaluate", "demo"]))
def test_the_workdir_of_another_model_is_refused_by_field_and_left_alone(
    trained, call, tmp_path, mode
):
    workdir = trained.copy(tmp_path)
    before = contents(workdir)
    status, _, err = call(
        TINY, f"--workdir={workdir}", f"--mode={mode}", "--config.model.num_heads=4"
    )
    way_out = (
        "another --workdir" if mode in ("sample", "evaluate") else "--workdir=NEW --init_from="
    )
    assert_one_sentence(status, err, "model.num_heads: 2 there, 4 here", way_out)
    assert contents(workdir) == before


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "process.path=cosine",
        "data.source.split=held_out",
        "objective.label_drop=0.5",
    ],
)
def test_a_run_is_not_continued_with_what_would_make_it_another(trained, call, tmp_path, change):
    status, _, err = call(TINY, f"--workdir={trained.copy(tmp_path)}", f"--config.{change}")
    field, _, value = change.partition("=")
    assert_one_sentence(status, err, f"{field}: ", value, " here): use its settings")


@pytest.mark.parametrize(
    "change",
    slow_but(
        ["model.unroll=2"],
        ["model.unroll=2", "model.remat=full", "train.steps_per_dispatch=1", "log.every_steps=1"],
    ),
)
def test_a_run_is_continued_with_what_only_changes_its_pace(trained, call, tmp_path, change):
    status, out, _ = call(TINY, f"--workdir={trained.copy(tmp_path)}", f"--config.{change}")
    assert status == 0
    assert f"resuming {tmp_path} at step 24" in out


@pytest.mark.parametrize(
    "change, told",
    [
        ("learning_rate=0.5", "optim.learning_rate: 0.003 before, 0.5 from step 24 on"),
        pytest.param(
            *("clip_norm=2.0", "optim.clip_norm: 1.0 before, 2.0 from step 24 on"),
            marks=pytest.mark.slow,
        ),
        ("schedule=linear", "the learning rate jumps from 0.003 to 0 at step 24: optim.schedule"),
    ],
)
def test_a_run_is_continued_with_other_updates_and_says_so(trained, call, tmp_path, change, told):
    status, out, _ = call(TINY, f"--workdir={trained.copy(tmp_path)}", f"--config.optim.{change}")
    assert status == 0
    assert f"resuming {tmp_path} at step 24" in out
    assert len([line for line in out.splitlines() if line.startswith(told)]) == 1


def test_a_dry_run_writes_nothing(call, tmp_path):
    status, out, err = call(DIGITS, f"--workdir={tmp_path}/run", "--dry_run")
    assert status == 0, err
    assert re.search(r"^total +[\d,]+ +[\d.]+$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", slow_but(set(CONFIGS) - {"configs/emoji.py"}, CONFIGS))
def test_every_config_is_taken_from_the_command_line(call, monkeypatch, config):
    """That they trace is shown once, in test_configs."""
    monkeypatch.setattr(modes, "describe", lambda exp: f"{exp.total_steps} steps")
    path = ["--config.data.path=docs"] if "images" in config else []  # two, of no class
    status, out, err = call(f"--config={config}", "--dry_run", *path)
    assert status == 0 and re.fullmatch(r"\d+ steps\n", out), err


def test_a_dry_run_shows_parameters_and_which_guidance_is_on_when(call, tmp_path):
    status, out, _ = call(
        *(TINY, "--dry_run", f"--workdir={tmp_path}/run"),
        *("--config.sample.sampler.num_steps=4", "--config.sample.cfg.high=0.5"),
    )
    exp = tiny.experiment()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(exp.abstract_params))
    assert status == 0
    assert re.search(rf"^total +{parameters:,} ", out, re.MULTILINE)
    assert "\ntimes: 1.0000, 0.7500, 0.5000, 0.2500, 0.0000\n" in out
    table = out[out.index("from t") :].splitlines()[1:]
    assert [line.split(maxsplit=3) for line in table] == [
        ["0-1", "1.0000", "0.5000", "ig 2"],
        ["2-3", "0.5000", "0.0000", "ig 2, cfg 1.2"],
    ]
    assert re.search(
        r"Euler, 4 steps, 6 network evaluations a sample, [\d.]+ [MG]FLOP; t = 1 is", out
    )
    assert "loss/flow" in out and "loss/internal_guidance" in out


def described(changes) -> tuple[str, str, list[list[str]]]:
    """What a dry run says of sampling, its times, and the rows of its table."""
    text = dry_run.describe(tiny.experiment(changes))
    about = text[text.index("sampling: ") :].splitlines()
    return *about[:2], [line.split(maxsplit=3) for line in about[3:]]


UNGUIDED = {"sample.ig.scale": 1.0, "sample.cfg.scale": 1.0}


@pytest.mark.slow
def test_a_dry_run_counts_the_second_evaluation_of_heun2_as_guided_at_its_own_time():
    sampler = {"sample.sampler": {"name": "heun2", "num_steps": 2}, "sample.cfg.low": 0.5}
    about, _, table = described(sampler)
    # At 1, 1/2, 1/2 both branches, at 0 one.
    assert about.startswith("sampling: Heun2, 2 steps, 7 network evaluations a sample,")
    assert [row[3] for row in table] == ["ig 2, cfg 1.2"] * len(table)


@pytest.mark.slow
def test_a_dry_run_shows_the_pieces_of_a_sampler_that_chooses_its_steps():
    sampler = {"sample.sampler": {"name": "dopri5", "num_steps": 9}, "sample.ig.low": 0.25}
    about, _, table = described({**UNGUIDED, **sampler, "sample.ig.scale": 3.0})
    assert "Dopri5, at most 9 steps of its own choice on each line below" in about
    assert table == [["0", "1.0000", "0.2500", "ig 3"], ["1", "0.2500", "0.0000", "off"]]


def training(changes) -> str:
    text = dry_run.describe(tiny.experiment(changes, jax.devices()[:1]))
    return text[text.index("training: ") : text.index("sampling: ")]


def kept(changes) -> float:
    return float(re.search(r"keeps about ([\d,.]+) MiB", training(changes))[1].replace(",", ""))


@pytest.mark.slow
def test_a_dry_run_counts_images_epochs_and_what_gradients_keep():
    text = training({"train.steps": 1000, "train.batch_size": 32})
    assert "1,000 steps of 32 images, 32,000 in all, or 22.2 epochs of 1,442; " in text
    assert "FLOP\nmemory: " in text  # an hour of no device
    assert "MiB a device, of 32 images at a time" in text
    once = kept({"train.batch_size": 64})
    assert kept({"train.batch_size": 128}) == pytest.approx(2 * once, rel=0.1)
    parts = {"train.batch_size": 128, "train.accumulation": 2}
    assert kept(parts) == pytest.approx(once, rel=0.01)
    assert kept({"train.batch_size": 64, "model.remat": "full"}) < once / 2


def test_a_dry_run_gives_the_hours_of_common_devices_or_of_the_one_that_is_named():
    def hours(peak: float | None) -> list[tuple[str, str]]:
        c = sit_xl.get_config("no_data")
        c.log.peak_tflops = peak
        exp = experiment.experiment(run_config.parse(c), jax.devices()[:1])
        count = exp.gradient_flops(c.train.batch_size) * exp.total_steps
        [line] = dry_run._hours(exp, count)
        return re.findall(r"([\d,]+) hours of ([^,]+),", line)

    names = ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "TPU v5e"]
    assert [name for _, name in hours(None)] == names
    h100, a100, _ = (float(number.replace(",", "")) for number, _ in hours(None))
    assert a100 / h100 == pytest.approx(989.5 / 312, rel=2e-3)
    # 7.1e11 FLOP an image (forward, and twice that for the gradient), 1.02e9 images.
    assert h100 == pytest.approx(7.11e11 * 800 * 1281167 / (0.4 * 989.5e12) / 3600, rel=5e-3)
    [(number, name)] = hours(98.95)
    assert name == "a device of 98.95 TFLOP/s"
    assert float(number.replace(",", "")) == pytest.approx(10 * h100, rel=2e-3)


@pytest.mark.slow
def test_a_dry_run_shows_shifted_times():
    _, times, table = described({**UNGUIDED, "sample.time_shift": 2.0})
    assert times == "times: 1.0000, 0.8000, 0.5000, 0.0000"
    assert table == [["0-2", "1.0000", "0.0000", "off"]]


@pytest.mark.slow
def test_a_dry_run_of_many_steps_is_short():
    sampler = {"sample.sampler": {"name": "euler", "num_steps": 250}, "sample.cfg.high": 0.5}
    _, times, table = described(sampler)
    assert times.startswith("times: 1.0000, 0.9960, ") and times.endswith("0.0040, 0.0000")
    assert "..." in times and [row[0] for row in table] == ["0-124", "125-249"]


def test_the_workdir_holds_what_made_the_run(trained):
    record = json.loads((trained.workdir / "config.json").read_text())
    assert record["config"]["model"]["hidden_size"] == 16
    assert record["versions"]["jax"] == jax.__version__
    assert record["command"]


def test_a_workdir_brings_its_config(trained, call, monkeypatch):
    """Its own run, with what the command line changes."""
    asked = []
    monkeypatch.setattr(modes, "run", lambda c, **given: asked.append((c, given["workdir"])))
    workdir = f"--workdir={trained.workdir}"
    changes = ["--config.sample.ig.scale=1.5", "--config.model.readouts=1", "--mode=sample"]
    for words in ([workdir, *changes], ["--workdir", str(trained.workdir), *changes[:2]]):
        assert call(*words)[::2] == (0, "")
    for config, folder in asked:
        parsed = run_config.parse(config, jax.device_count())
        expected = tiny.settings({"sample.ig.scale": 1.5})
        assert parsed == run_config.parse(expected, jax.device_count())
        assert folder == str(trained.workdir)


def test_a_workdir_without_a_config_asks_for_one(call, tmp_path):
    assert_one_sentence(*call(f"--workdir={tmp_path}")[::2], "--config is missing")
    (tmp_path / "config.json").write_text("{")
    assert_one_sentence(*call(f"--workdir={tmp_path}")[::2], f"{tmp_path}/config.json")
    (tmp_path / "config.json").write_text("[1]")
    assert_one_sentence(*call(f"--workdir={tmp_path}")[::2], "is damaged; name the --config")


def test_the_config_of_an_import_finds_its_workdir(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert modes.default_workdir(f"{tmp_path}/config.py:array_record") == str(tmp_path)


def test_the_default_workdir_is_named_after_the_config_and_its_argument():
    assert modes.default_workdir("configs/digits.py") == "runs/digits"
    assert modes.default_workdir("configs/digits.py:large") == "runs/digits-large"


@pytest.mark.slow
def test_the_program_tells_a_dry_run_on_stdout_and_ends_with_0(tmp_path):
    done = program(f"--config={tiny.ROOT}/configs/digits.py", "--dry_run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "total" in done.stdout and "from t" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "case", slow_but(["unknown_key"], ["missing_file", "unknown_key", "broken_rule"])
)
def test_the_program_ends_with_2_and_one_sentence(case):
    arguments, parts = MISTAKES[case]
    done = program(*arguments)
    assert_one_sentence(done.returncode, done.stderr, *parts)
    assert done.stdout == ""


@pytest.mark.parametrize("mode", ["train", "sample", "demo", "import", "export"])
def test_a_backend_that_is_not_there_is_told_in_every_mode(call, monkeypatch, tmp_path, mode):
    def devices():
        raise AssertionError  # as jax does of a cuda that is not installed

    monkeypatch.setattr(jax, "devices", devices)
    jobs = {"import": ["--checkpoint=x.pt"], "export": ["--output=x.safetensors"]}
    arguments = jobs.get(mode, [TINY])
    status, _, err = call(*arguments, f"--workdir={tmp_path}/run", f"--mode={mode}")
    assert_one_sentence(status, err, "JAX_PLATFORMS=cpu: jax cannot start there", "unset it")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_program_tells_a_backend_that_jax_does_not_know(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    done = program(DIGITS, "--dry_run")
    assert_one_sentence(done.returncode, done.stderr, "JAX_PLATFORMS=nonsense: ", "pip install")
