"""--mode=select: short runs of a choice under the same seeds, ranked.

Such as the depth of a readout, or the blocks of self-alignment: `select.values` lists what each
field may be. Every combination is trained, as long as the config says, under every seed; all see
the same data, noise and times, so that differences lose what they share.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ig_jax.checkpoint import versions
from ig_jax.errors import UserError, shown
from ig_jax.evaluation.report import BETTER
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors
from ig_jax.monitoring import console
from ig_jax.study import choices, methods, report
from ig_jax.study.cells import Cells
from ig_jax.study.measures import LOSS, Bench


def describe(exp: Experiment, workdir: Path) -> str:
    """Describes the runs that `run` would make. Raises UserError where a candidate cannot be."""
    chosen = choices.study_of(exp.config.raw, exp.config.select)
    return methods.describe(methods.rows(exp, chosen, workdir), chosen.seeds)


def run(exp: Experiment, workdir: Path) -> dict[str, Any]:
    """Trains the candidates that are missing, then writes select.md, select.png, select.json.

    Returns:
      What select.json holds; its `ranking` names the candidates, best first.

    Raises:
      Stopped: a signal asked training to stop; the same command goes on.
      UserError: there is nothing to choose from, or a candidate cannot be; a run was made with
        other settings; the disk is full or gone.
    """
    metric, better = exp.config.select.metric, {LOSS: "lower", **BETTER}
    if metric not in better:
        raise UserError(f"select.metric = {shown(metric)}: must be one of {', '.join(better)}")
    chosen = choices.study_of(exp.config.raw, exp.config.select)
    folder = workdir / "select"
    rows = methods.rows(exp, chosen, folder)
    own = chosen.baseline
    with disk_errors.reported(workdir):
        cells = Cells(folder, rows, chosen.seeds, Bench(exp, chosen.measures, chosen.probe))
        cells.fill()
        found = cells.rows()
        ranked = report.ranked(found, metric, better[metric])
        table = report.ranking(found, ranked, own, metric)
        record = {
            "ranking": ranked,
            **report.record(found, own, chosen.seeds, [metric]),
            "settings": exp.config.raw["select"],
            "versions": versions.versions(),
        }
        plot = partial(report.draw, rows=found, baseline=own, measures=[metric])
        report.write(workdir, "select", table, record, plot)
    console.say(f"\n{table}\n")
    console.say(
        "means with 95 % intervals over seeds; 'minus config' is paired by seed, bold where its "
        "interval leaves out 0"
    )
    console.say(f"all numbers: {workdir / 'select.json'}")
    return record
