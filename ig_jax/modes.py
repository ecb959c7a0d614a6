"""From flags to programs: everything that main.py does, importable."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from ig_jax import experiment
from ig_jax.config import kinds, run_config
from ig_jax.config.parser import nearest
from ig_jax.errors import LONGEST_SHOWN, UserError, shown
from ig_jax.experiment import Experiment
from ig_jax.interop import declared
from ig_jax.io import disk_errors, paths
from ig_jax.monitoring import console
from ig_jax.parallel import distributed, lock
from ig_jax.parallel.preemption import Stopped
from ig_jax.programs import (
    compare,
    compose_average,
    demo,
    evaluate,
    export_checkpoint,
    import_checkpoint,
    memory_check,
    prepare,
    probe,
    reference,
    replay,
    sample,
    search,
    select,
    study,
    visualize,
)
from ig_jax.programs.dry_run import describe
from ig_jax.training import trainer

TRAINING = ("train", "demo")
_TABLES = {"study": study, "select": select}  # of many runs
_PROGRAMS = {
    "sample": sample,
    "evaluate": evaluate,
    "search": search,
    "prepare": prepare,
    "reference": reference,
    "replay": replay,
    "visualize": visualize,
    "probe": probe,
    "ema": compose_average,
    **_TABLES,
}
MODES = (  # in the order that users see
    *("train", "sample", "evaluate", "search", "demo", "prepare", "reference"),
    *("replay", "visualize", "probe", "ema", "study", "select"),
)
# In one process.
ALONE = ("search", "demo", "replay", "visualize", "probe", "ema", "study", "select")
WITHOUT_CONFIG = ("import", "export", "compare")
DECLARED = declared.DECLARABLE  # of --mode=import: what a file does not say


def default_workdir(config_location: str) -> str:
    """configs/digits.py -> runs/digits, configs/digits.py:variant -> runs/digits-variant.

    A config.py beside checkpoints, as --mode=import writes it, is that run's.
    """
    path, _, variant = config_location.partition(":")
    folder = Path(path).parent
    if Path(path).name == "config.py" and (folder / "checkpoints").is_dir():
        return str(folder)
    return f"runs/{Path(path).stem}" + (f"-{variant}" if variant else "")


def explain_flags(error: Exception, argv: list[str]) -> str:
    """One sentence for what absl or ml_collections raised while parsing the command line."""
    text = " ".join(_explained(error, argv).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return re.sub(
        rf"\S{{{LONGEST_SHOWN + 1},}}", lambda long: f"{long[0][:LONGEST_SHOWN]}...", text
    )


def _explained(error: Exception, argv: list[str]) -> str:
    # A KeyError shows its message as code: with quotes and line ends escaped.
    text = str(error).replace("\\'", "'").replace("\\n", " ")
    location = next((a for a in argv if a.startswith("--config=")), "--config")
    fields = [a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")]
    keys = set(re.findall(r"'(\w+)'", text))
    unknown = [f for f in fields if f in text or keys & set(f.split("."))]
    if "<class 'method'>" in text and unknown:  # a section named as a method of ConfigDict
        return f"{unknown[0]}: cannot be set on the command line; write a config that does"
    if isinstance(error, AttributeError | KeyError) and unknown:
        hint = re.search(r'Did you mean "(\w+)"', text)
        fix = f"did you mean {hint[1]!r}?" if hint else "configs/base.py shows every field"
        section = unknown[0].rpartition(".")[0]
        if section in kinds.named_sections():
            fix += f"; those of another kind go with --config.{section}.name=..., see --help_fields"
        return f"{unknown[0]}: unknown field; {fix}"
    if isinstance(error, IndexError | TypeError) and fields and not _is_raised_in(error, location):
        return f"{' or '.join(fields)}: no such field; configs/base.py shows every field"
    if isinstance(error, OSError):
        return f"{location}: no such config file, or it cannot be read; see the folder configs/"
    if "Traceback" in text:
        lines = text.strip().split("\n")
        raised = re.sub(r"^\w+Error: ", "", lines[-1].strip())
        return f"{lines[0].split(': Error')[0].removeprefix('flag ')}: {raised}"
    return text if "flag" in text.lower() else f"{location}: {text}"


def _is_raised_in(error: Exception, location: str) -> bool:
    """Returns whether the config file at --config=<location> was running."""
    file = os.path.abspath(location.removeprefix("--config=").partition(":")[0])
    frames = traceback.extract_tb(error.__traceback__)
    return any(os.path.abspath(frame.filename) == file for frame in frames)


def run(
    settings: ml_collections.ConfigDict,
    *,
    workdir: str | os.PathLike[str],
    mode: str = "train",
    dry_run: bool = False,
    init_from: str | None = None,
    import_seconds: float = 0.0,
) -> Any:
    """Runs one mode on all devices; what it returns is in the `run` of the mode's module.

    Raises:
      UserError: a mistake in the mode, the config, the workdir or the data, in one sentence.
      Stopped: SIGTERM or Ctrl-C asked training to stop, and its last step is saved. Programs other
        than training and the demo end at once, as signals are wont, and go on when run again.
    """
    if mode not in MODES:
        raise UserError(f"mode = {shown(mode)}: no such mode; {nearest(str(mode), MODES)}")
    folder = Path(paths.given(workdir, "--workdir"))
    distributed.require_devices()
    if mode in ALONE and jax.process_count() > 1:
        raise UserError(f"--mode={mode}: runs in one process, on all devices of its machine")
    if init_from is not None and mode not in TRAINING:
        raise UserError(f"--init_from: is for {' and '.join(TRAINING)}, not for --mode={mode}")
    exp = experiment.experiment(run_config.parse(settings, devices=jax.device_count()))
    if dry_run:
        console.say(describe(exp))
        if mode in _TABLES:
            console.say(f"\n{_TABLES[mode].describe(exp, folder)}")
        return None
    shortage = memory_check.shortage(exp, mode)
    if shortage:
        raise UserError(shortage)
    if mode == "train":
        return _train(exp, folder, init_from)
    if mode == "demo":
        return demo.run(exp, folder, import_seconds, init_from)
    return _PROGRAMS[mode].run(exp, folder)


def _train(exp: Experiment, workdir: Path, init_from: str | None) -> trainer.Outcome:
    """Raises Stopped where `train.run` leaves it to the caller to look."""
    outcome = trainer.run(exp, workdir, init_from)
    trainer.draw_losses(workdir)
    if outcome.stopped_by:
        raise Stopped(outcome.stopped_by)
    return outcome


def compare_runs(runs: str, workdir: str | os.PathLike[str]) -> None:
    """--mode=compare; `runs` are workdirs with commas between."""
    distributed.require_devices()
    places = [paths.given(place.strip(), "--runs") for place in runs.split(",") if place.strip()]
    compare.run(places, Path(paths.given(workdir, "--workdir")))


def import_file(
    file: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    bases: Mapping[str, ml_collections.ConfigDict],
    **flags: Any,
) -> None:
    """--mode=import; `flags`: see `import_checkpoint`."""
    distributed.require_devices()
    source = Path(paths.given(file, "--checkpoint"))
    folder = Path(paths.given(workdir, "--workdir"))
    with lock.held(folder), disk_errors.reported(folder):
        import_checkpoint.import_checkpoint(source, folder, bases, **flags)


def export_run(
    workdir: str | os.PathLike[str], output: str | os.PathLike[str], weights: str
) -> None:
    """--mode=export; see `export_checkpoint`."""
    distributed.require_devices()
    target = Path(paths.given(output, "--output"))
    folder = Path(paths.given(workdir, "--workdir"))
    with lock.held(target.parent, f".{target.name}.lock"), disk_errors.reported(target.parent):
        export_checkpoint.export_checkpoint(folder, target, weights)
