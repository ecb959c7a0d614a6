"""--mode=study: methods trained under the same seeds, measured alike, in one table."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ig_jax.checkpoint import versions
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors
from ig_jax.monitoring import console
from ig_jax.study import methods, report
from ig_jax.study.cells import Cells
from ig_jax.study.measures import Bench


def describe(exp: Experiment, workdir: Path) -> str:
    """Describes the runs that `run` would make. Raises UserError where a method cannot be."""
    study = exp.config.study
    return methods.describe(methods.rows(exp, study, workdir), study.seeds)


def run(exp: Experiment, workdir: Path) -> dict[str, Any]:
    """Fills the cells that are missing in `workdir`, then writes study.md, study.png, study.json.

    Other processes may work in the same folder: they share the cells.

    Returns:
      What study.json holds.

    Raises:
      Stopped: a signal asked training to stop; the same command goes on.
      UserError: no method is named, or one cannot be; a cell was made with other settings; the disk
        is full or gone.
    """
    study = exp.config.study
    rows = methods.rows(exp, study, workdir)
    baseline = next(iter(rows))
    with disk_errors.reported(workdir):
        bench = Bench(exp, study.measures, study.probe)
        cells = Cells(workdir, rows, study.seeds, bench)
        cells.fill()
        found, names = cells.rows(), bench.names
        table = report.table(found, baseline, names, bench.floor)
        record = {
            **report.record(found, baseline, study.seeds, names),
            "held_out_data": bench.floor,
            "settings": exp.config.raw["study"],
            "versions": versions.versions(),
        }
        plot = partial(report.draw, rows=found, baseline=baseline, measures=names)
        report.write(workdir, "study", table, record, plot)
    console.say(f"\n{table}\n")
    console.say(
        f"means with 95 % intervals over seeds; in brackets the difference from {baseline}, paired "
        "by seed, bold where its interval leaves out 0"
    )
    console.say(f"all numbers: {workdir / 'study.json'}")
    return record
