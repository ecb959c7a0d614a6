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

from ig_jax import (
    build,
    config,
    demo,
    describe,
    distributed,
    evaluate,
    exporting,
    importing,
    logs,
    memory,
    prepare,
    reference,
    replay,
    sample,
    search,
    train,
)
from ig_jax.errors import LONGEST, UserError
from ig_jax.interop import told

MODES = ("train", "sample", "evaluate", "search", "demo", "prepare", "reference", "replay")
ALONE = ("search", "demo", "replay")  # in one process
CONVERSIONS = ("import", "export")  # of files; without a config
TOLD = told.FLAGS  # of --mode=import: what a file does not say


def default_workdir(config_location: str) -> str:
    """configs/digits.py -> runs/digits, configs/digits.py:variant -> runs/digits-variant."""
    path, _, variant = config_location.partition(":")
    return f"runs/{Path(path).stem}" + (f"-{variant}" if variant else "")


def explain_flags(error: Exception, argv: list[str]) -> str:
    """One sentence for what absl or ml_collections raised while parsing the command line."""
    text = " ".join(_explained(error, argv).split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return re.sub(rf"\S{{{LONGEST + 1},}}", lambda long: f"{long[0][:LONGEST]}...", text)


def _explained(error: Exception, argv: list[str]) -> str:
    # A KeyError shows its message as code: with quotes and line ends escaped.
    text = str(error).replace("\\'", "'").replace("\\n", " ")
    location = next((a for a in argv if a.startswith("--config=")), "--config")
    given = [a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")]
    keys = set(re.findall(r"'(\w+)'", text))
    unknown = [f for f in given if f in text or keys & set(f.split("."))]
    if "<class 'method'>" in text and unknown:  # a section named as a method of ConfigDict
        return f"{unknown[0]}: cannot be set on the command line; write a config that does"
    if isinstance(error, AttributeError | KeyError) and unknown:
        hint = re.search(r'Did you mean "(\w+)"', text)
        mend = f"did you mean {hint[1]!r}?" if hint else "configs/base.py shows every field"
        return f"{unknown[0]}: unknown field; {mend}"
    if isinstance(error, IndexError | TypeError) and given and not _is_raised_in(error, location):
        return f"{' or '.join(given)}: no such field; configs/base.py shows every field"
    if isinstance(error, OSError):
        return f"{location}: no such config file, or it cannot be read; see the folder configs/"
    if "Traceback" in text:
        lines = text.strip().split("\n")
        raised = re.sub(r"^\w+Error: ", "", lines[-1].strip())
        return f"{lines[0].split(': Error')[0].removeprefix('flag ')}: {raised}"
    return text if "flag" in text.lower() else f"{location}: {text}"


def _is_raised_in(error: Exception, location: str) -> bool:
    """Whether the config file at --config=<location> was running."""
    file = os.path.abspath(location.removeprefix("--config=").partition(":")[0])
    frames = traceback.extract_tb(error.__traceback__)
    return any(os.path.abspath(frame.filename) == file for frame in frames)


def _make_workdir(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{jax.process_index()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: cannot be written to ({error.strerror}); name another"
        ) from error


def run(
    settings: ml_collections.ConfigDict,
    *,
    workdir: str,
    mode: str = "train",
    dry_run: bool = False,
    import_seconds: float = 0.0,
) -> Any:
    """Runs one mode on all devices.

    Raises:
      UserError: a mistake in the config, the workdir or the data, told in one sentence.
    """
    distributed.require_devices()
    if mode in ALONE and jax.process_count() > 1:
        raise UserError(f"--mode={mode}: runs in one process, on all devices of its machine")
    parsed = config.parse(settings, devices=jax.device_count())
    exp = build.experiment(parsed)
    if dry_run:
        return logs.say(describe.describe(exp))
    shortage = memory.shortage(exp, mode)
    if shortage:
        raise UserError(shortage)
    folder = Path(workdir)
    if mode in ("train", "demo", "prepare", "reference") or parsed.evaluate.samples:
        _make_workdir(folder)
    if mode == "train":
        return train.run(exp, folder)
    if mode == "sample":
        return sample.run(exp, folder)
    if mode == "evaluate":
        return evaluate.run(exp, folder)
    if mode == "prepare":
        return prepare.run(exp, folder)
    if mode == "reference":
        return reference.run(exp, folder)
    if mode == "search":
        return search.run(exp, folder)
    if mode == "replay":
        return replay.run(exp, folder)
    return demo.run(exp, folder, import_seconds)


def import_(
    file: str, workdir: str, bases: Mapping[str, ml_collections.ConfigDict], **flags: Any
) -> None:
    """--mode=import; `flags`: see `importing.import_`."""
    distributed.require_devices()
    _make_workdir(Path(workdir))
    importing.import_(Path(file), Path(workdir), bases, **flags)


def export(workdir: str, output: str, weights: str) -> None:
    """--mode=export; see `exporting.export`."""
    distributed.require_devices()
    exporting.export(Path(workdir), Path(output), weights)
