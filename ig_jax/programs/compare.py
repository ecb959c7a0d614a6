"""--mode=compare: runs side by side: what they were told, how they went, what they draw."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ig_jax import pytree
from ig_jax.checkpoint import run_file
from ig_jax.errors import UserError, shown
from ig_jax.evaluation.report import METRICS, to_text
from ig_jax.experiment import open_run
from ig_jax.io import disk_errors, files
from ig_jax.monitoring import console, metric_writer
from ig_jax.parallel import lock
from ig_jax.plots import image_grid, run_curves

MOST_RUNS = 20
ABSENT = "-"
_SAMPLES, _COLUMNS = 16, 4
Table = list[list[str]]


@dataclass(frozen=True)
class Run:
    """A run, as its workdir describes it.

    Attributes:
      name: the shortest end of its path that no other run has.
      settings: the recorded config by dotted name.
      lines: of metrics.jsonl.
      evaluations: records of its evaluations, in the order of their folders.
    """

    name: str
    workdir: Path
    settings: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]


def run(runs: Sequence[str], workdir: Path) -> None:
    """Compares the runs in the given workdirs; writes compare.md, compare.html and images.

    Raises:
      UserError: there are fewer than two runs, one has no record, or the disk is full or gone.
    """
    places = list(dict.fromkeys(map(Path, runs)))
    if not 2 <= len(places) <= MOST_RUNS:
        raise UserError(
            f"--runs = {shown(','.join(runs))}: name 2 to {MOST_RUNS} workdirs, with commas between"
        )
    found = [_read(name, place) for name, place in zip(_names(places), places, strict=True)]
    with lock.held(workdir), disk_errors.reported(workdir):
        curves = run_curves.curves({r.name: r.lines for r in found})
        sections = [("Settings that differ", _settings(found))]
        sections += [("Last losses", _losses(found, curves)), ("Evaluations", _evaluations(found))]
        images = {}
        if curves:
            run_curves.draw(curves, [r.name for r in found], workdir / "curves.png")
            images["curves.png"] = ("Curves", "Losses and evaluations; faint: as logged.")
        remarks = _draw_samples(found, workdir / "samples.png")
        if (workdir / "samples.png").exists():
            images["samples.png"] = ("Samples", "Of the same noise and labels.")
        title = f"{' and '.join(r.name for r in found)}"
        files.write_text(workdir / "compare.md", _markdown(title, sections, images, remarks))
        page = _page(title, sections, images, remarks, workdir)
        files.write_text(workdir / "compare.html", page)
    console.say((workdir / "compare.md").read_text())
    console.say(f"as a page: {workdir / 'compare.html'}")


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [os.path.abspath(place).split(os.sep) for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"--runs: names {places[0]} in several ways; name every workdir once")


def _read(name: str, workdir: Path) -> Run:
    config = run_file.read(workdir, "--runs", "name workdirs of runs")["config"]
    evaluations = []
    for results in sorted(workdir.glob("evaluations/*/results.json")):
        with suppress(UserError):  # one that was cut off is no result
            found = files.read_json(results)
            if isinstance(found, dict) and isinstance(found.get("measures"), dict):
                evaluations.append(found)
    return Run(
        name, workdir, pytree.flatten(config), metric_writer.read_metrics(workdir), evaluations
    )


def _settings(runs: Sequence[Run]) -> Table:
    """A row for each field of the configs that is not the same in all."""
    fields = sorted({field for r in runs for field in r.settings})
    rows = [["field", *(r.name for r in runs)]]
    for field in fields:
        values = [r.settings.get(field, ABSENT) for r in runs]
        if any(value != values[0] for value in values):
            rows.append([field, *(_text(value) for value in values)])
    return rows


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _losses(runs: Sequence[Run], curves: run_curves.Curves) -> Table:
    """The last smoothed value of every loss, and at which step."""
    terms = [name for name in curves if name.startswith("loss")]
    rows = [["run", "step", *terms]]
    for r in runs:
        last = [curves[t].get(r.name) for t in terms]
        step = str(r.lines[-1]["step"]) if r.lines else ABSENT
        ends = [ABSENT if x is None else f"{_end(x[1]):.4g}" for x in last]
        rows.append([r.name, step, *ends])
    return rows


def _end(values: Sequence[float | int]) -> float:
    """The mean of the last twentieth."""
    return float(np.mean(values[-max(1, len(values) // 20) :]))


def _evaluations(runs: Sequence[Run]) -> Table:
    """A row for each evaluation: means and standard deviations over sampling seeds."""
    known = [m for m in METRICS if any(m in e["measures"] for r in runs for e in r.evaluations)]
    rows = [["run", *(METRICS[m][0] for m in known), "of"]]
    for r in runs:
        for e in r.evaluations:
            cells = [to_text(m, e["measures"][m]) if m in e["measures"] else ABSENT for m in known]
            rows.append([r.name, *cells, str(e.get("of", ABSENT))])
    return rows


def _draw_samples(runs: Sequence[Run], path: Path) -> list[str]:
    """Draws samples of the same noise and labels, as each run is set to; says what has none."""
    path.unlink(missing_ok=True)
    grids, remarks, shapes = {}, [], set()
    for r in runs:
        try:
            pipeline = open_run(r.workdir, "ema", None, "--runs")
            images = pipeline.sample(np.arange(_SAMPLES) % pipeline.num_classes, seed=0)
            grids[r.name] = image_grid.grid(images, _COLUMNS, least_side=32)
            shapes.add((pipeline.latent_shape, pipeline.num_classes))
        except (UserError, ValueError) as error:
            remarks.append(f"No samples of {r.name}: {error}")
    if len(shapes) > 1:
        remarks.append("The runs are of different latents or classes: their noise is not the same.")
    if grids:
        image_grid.save(path, image_grid.panels(grids))
    return remarks


def _markdown(
    title: str,
    sections: Sequence[tuple[str, Table]],
    images: Mapping[str, tuple[str, str]],
    remarks: list[str],
) -> str:
    lines = [f"# {title}", ""]
    for heading, table in sections:
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
        lines += [f"## {heading}", "", console.markdown(escaped) if table[1:] else "None.", ""]
    for name, (heading, text) in images.items():
        lines += [f"## {heading}", "", text, "", f"![{heading}]({name})", ""]
    return "\n".join([*lines, *remarks]).rstrip() + "\n"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
       background: Canvas; color: CanvasText; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid color-mix(in srgb, CanvasText 25%, Canvas); padding: .25rem .6rem;
         text-align: left; white-space: nowrap; }
th { background: color-mix(in srgb, CanvasText 8%, Canvas); }
img { max-width: 100%; background: white; border-radius: 4px; }
"""


def _page(
    title: str,
    sections: Sequence[tuple[str, Table]],
    images: Mapping[str, tuple[str, str]],
    remarks: list[str],
    folder: Path,
) -> str:
    """One HTML page that needs no other file, for light and dark screens."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, table in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        parts.append(_html_table(table) if table[1:] else "<p>None.</p>")
    for name, (heading, text) in images.items():
        encoded = base64.b64encode(files.read_bytes(folder / name)).decode()
        parts.append(f"<h2>{heading}</h2><p>{text}</p>")
        parts.append(f'<img alt="{heading}" src="data:image/png;base64,{encoded}">')
    parts += [f"<p>{html.escape(remark)}</p>" for remark in remarks]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _html_table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"

    return f"<table>{row(table[0], 'th')}{''.join(row(r, 'td') for r in table[1:])}</table>"
