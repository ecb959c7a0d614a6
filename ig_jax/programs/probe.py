"""--mode=probe: what a network's features tell about classes, by block and noise level."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from ig_jax.checkpoint import compatibility, versions
from ig_jax.checkpoint.state_file import StateFile
from ig_jax.errors import UserError, shown
from ig_jax.evaluation import probing
from ig_jax.evaluation.probing import ProbeResult, Share
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors, files
from ig_jax.monitoring import console
from ig_jax.parallel import lock
from ig_jax.plots import probe_map
from ig_jax.programs import run_record
from ig_jax.types import Source

RESULTS, TABLE, MAP, _STATE = "results.json", "table.md", "map.png", ".state.npz"


def run(exp: Experiment, workdir: Path) -> dict[str, Any]:
    """Probes the newest checkpoint of `workdir`; writes a folder of its probes/.

    Returns:
      What results.json there holds.

    Raises:
      UserError: there is no checkpoint, the data have no classes or cannot be read, another program
        makes the same probe, or the disk is full or gone.
    """
    source, test = exp.config.data.source, _test(exp)
    probing.require_classes(source)
    with disk_errors.reported(workdir):
        step, params = run_record.load_weights(exp, workdir)
        settings = _settings(exp, step)
        name = f"step{step}-{settings['weights']}-{run_record.settings_digest(settings)}"
        target = workdir / "probes" / name
        with lock.held(target), disk_errors.reported(target):
            record = _done(target / RESULTS, settings)
            if record is None:
                pipeline, saved = replace(exp.pipeline, params=params), StateFile(target / _STATE)
                console.say_data(source)
                found = probing.probe(pipeline, source, test, exp.config.probe, saved)
                record = _write(target, found, settings)
                saved.remove()
    console.say(f"\n{(target / TABLE).read_text()}\nall numbers: {target / RESULTS}")
    return record


def _test(exp: Experiment) -> Source | None:
    """The test set that `probe.test_path` and `probe.test_split` name, or the source holds out."""
    p, source = exp.config.probe, exp.config.data.source
    named = {"path": p.test_path, "split": p.test_split}
    changes = {name: value for name, value in named.items() if value is not None}
    for name, value in changes.items():
        if not hasattr(source, name):
            kind = exp.config.raw["data"]["source"]["name"]
            raise UserError(
                f"probe.test_{name} = {shown(value)}: data.source.name = {kind!r} has no {name}; "
                "leave it out"
            )
    test = replace(source, **changes) if changes else source.held_out()
    if test is None:
        console.say(
            "no test set: name it in probe.test_path, or probe.test_split; only accuracies on the "
            "validation share of the training set are reported"
        )
    elif test.stored_shape != source.stored_shape:
        raise UserError(
            f"probe.test_path, test_split = {shown(tuple(named.values()))}: hold examples of "
            f"{test.stored_shape}, data.source of {source.stored_shape}; name the same kind"
        )
    return test


def _settings(exp: Experiment, step: int) -> dict[str, Any]:
    """All that decides what is found, for the record and the folder's name."""
    raw = exp.config.raw
    probe = {k: v for k, v in raw["probe"].items() if k != "save_every_steps"}
    rest = {name: raw[name] for name in ("data", "model", "process")}
    weights = exp.config.sample.weights
    return {"checkpoint_step": step, "weights": weights, "probe": probe, **rest}


def _done(file: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a probe that came to its end; a damaged one is made again."""
    if not file.exists():
        return None
    with suppress(UserError):
        record = files.read_json(file)
        if isinstance(record, dict) and record.get("settings") == compatibility.as_json(settings):
            return record
    console.say(f"{file}: is damaged; it is made again")
    return None


def _write(target: Path, found: ProbeResult, settings: dict[str, Any]) -> dict[str, Any]:
    record = {
        "times": list(found.times),
        "blocks": list(found.blocks),
        "validation_accuracy": found.validation.tolist(),
        "time": found.time,
        "block": found.block,
        "validation": _record(found.chosen),
        "test": _record(found.test),
        "nearest_neighbours": _record(found.neighbours),
        "trained_on": found.trained_on,
        "settings": compatibility.as_json(settings),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions.versions(),
    }
    files.write_text(target / TABLE, table(found))
    title = f"linear probes, {found.chosen.images:,} validation images"
    probe_map.draw(target / MAP, found.validation, found.times, found.blocks, title)
    files.write_json(target / RESULTS, record)  # at last: with it the probe is done
    return record


def _record(share: Share | None) -> dict[str, Any] | None:
    if share is None:
        return None
    return {**share._asdict(), "accuracy": share.accuracy, "interval_95": list(share.interval)}


def _in_words(share: Share) -> str:
    """'97.2 % (95.0 to 98.5, n = 355)'."""
    low, high = (100 * end for end in share.interval)
    return f"{100 * share.accuracy:.1f} % ({low:.1f} to {high:.1f}, n = {share.images:,})"


def table(found: ProbeResult) -> str:
    """Markdown: the grid on the validation share, and the chosen cell."""
    rows = [["block", *(f"t = {t:g}" for t in found.times)]]
    for j, block in enumerate(found.blocks):
        rows.append([str(block), *(f"{100 * a:.1f}" for a in found.validation[:, j])])
    lines = [
        f"Linear probes, accuracy in % on {found.chosen.images:,} validation images, trained on "
        f"{found.trained_on:,}:",
        "",
        console.markdown(rows),
        "",
        f"Best cell: block {found.block}, t = {found.time:g}; in brackets 95 % intervals over "
        "images.",
        "",
        f"- validation, by which it was chosen: {_in_words(found.chosen)}",
    ]
    if found.test is not None:
        lines.append(f"- test: {_in_words(found.test)}")
    if found.neighbours is not None:
        on = "validation" if found.test is None else "test"
        lines.append(f"- nearest neighbours, {on}: {_in_words(found.neighbours)}")
    return "\n".join(lines) + "\n"
