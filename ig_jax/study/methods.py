"""From the section `study` to the experiment of each method and seed, checked before any begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ig_jax import pytree
from ig_jax.checkpoint import compatibility
from ig_jax.config.run_config import parse
from ig_jax.config.studies import Method, Study
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.monitoring import flops
from ig_jax.pipeline import require_same_data
from ig_jax.study.overrides import merged

# Of a whole study, not of one of its runs.
_TABLES = ("study", "select")
_COMPARED = (*compatibility.CONTINUES, "sample", "evaluate")
# Below `sample`: what a cell has of its own, or what changes no sample.
_FREE_OF_SAMPLE = ("num", "seed", "files", "batch_size")
_OF_EVALUATION = ("num", "features", "reference")


@dataclass(frozen=True)
class Row:
    """A method: how its runs are trained and sampled."""

    name: str
    exp: Experiment  # under the seed of the config; see `of_seed`
    run: str  # the method whose runs it samples: this one, or another
    guide: str | None  # the method whose runs guide (autoguidance)
    init_from: str | None  # the method whose runs its own start from

    def of_seed(self, seed: int) -> Experiment:
        config = self.exp.config
        config = replace(config, seed=seed, raw={**config.raw, "seed": seed})
        return Experiment(config, self.exp.mesh)

    def settings(self, seed: int) -> dict[str, Any]:
        """All that the numbers of a cell depend on, as JSON gives it back."""
        exp = self.of_seed(seed)
        raw = {name: exp.config.raw[name] for name in _COMPARED}
        sample = {n: v for n, v in raw["sample"].items() if n not in _FREE_OF_SAMPLE}
        sample["guide"] = {n: v for n, v in sample["guide"].items() if n != "workdir"}
        evaluate = {name: raw["evaluate"].get(name) for name in _OF_EVALUATION}
        return compatibility.as_json(
            {
                "config": {**raw, "sample": sample, "evaluate": evaluate},
                "steps": exp.total_steps,
                "run": self.run,
                "guide": self.guide,
                "init_from": self.init_from,
            }
        )


def describe(rows: Mapping[str, Row], seeds: tuple[int, ...]) -> str:
    """Lists all that there is to train and to measure, in lines."""
    lines, total = [], 0
    for name, row in rows.items():
        c, steps = row.exp.config, row.exp.total_steps
        each = row.exp.gradient_flops(c.train.batch_size)
        if row.run == name:
            total += len(seeds) * steps * each
            lines.append(f"  {name}: {steps:,} steps, {flops.in_words(steps * each)} a run")
        else:
            lines.append(f"  {name}: samples the runs of {row.run}")
    runs = len({row.run for row in rows.values()}) * len(seeds)
    cells = f"{len(rows)} methods under {len(seeds)} seeds: {runs} runs, {flops.in_words(total)}"
    return "\n".join([f"study: {cells}", *lines])


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each difference between two `Row.settings`."""
    of_config = compatibility.mismatches(old["config"], new["config"], _COMPARED)
    rest = [{n: v for n, v in each.items() if n != "config"} for each in (old, new)]
    return of_config + pytree.differences(*rest)


def rows(exp: Experiment, study: Study, workdir: Path) -> dict[str, Row]:
    """The methods by name: the baseline, those with runs of their own, those that need other runs.

    So the runs of one method follow each other, and share their compiled program.

    Args:
      exp: of the config that all of them change.
      study: its section, or one made for it.
      workdir: of the study.

    Raises:
      UserError: the config of a method cannot be; names it.
    """
    if not study.methods:
        raise UserError(
            "study.methods: names none; docs/study.md and configs/digits.py:study show how"
        )
    if study.baseline is None:
        raise UserError("study.baseline = None: name the method that others are compared with")

    def place(name: str) -> tuple[bool, bool]:
        method = study.methods[name]
        return name != study.baseline, bool(method.same_run_as or method.guide or method.init_from)

    found: dict[str, Row] = {}
    for name in sorted(study.methods, key=place):
        method = study.methods[name]
        with _named(name):
            found[name] = _row(exp, study, name, method, workdir)
    for name, row in found.items():
        if row.guide:
            with _named(name):
                _check_guide(row, found[row.guide])
    return found


@contextmanager
def _named(method: str) -> Iterator[None]:
    try:
        yield
    except (UserError, ValueError) as error:
        raise UserError(f"study.methods.{method}: {error}") from error


def _row(exp: Experiment, study: Study, name: str, method: Method, workdir: Path) -> Row:
    raw = {section: value for section, value in exp.config.raw.items() if section not in _TABLES}
    run = method.same_run_as or name
    if run != name:
        raw = merged(raw, study.methods[run].overrides)
    raw = merged(raw, method.overrides)
    if method.guide is None and pytree.flatten(raw).get("sample.autoguidance.scale", 1) != 1:
        raise UserError(
            "sample.autoguidance is on: set guide to the method whose runs are the worse network"
        )
    if method.guide:
        raw = merged(raw, {"sample": {"guide": {"workdir": str(workdir / method.guide)}}})
    config = parse(ConfigDict(raw), exp.mesh.size)
    deepest = max(study.probe.blocks, default=0)
    if "probe" in study.measures and deepest > config.model.depth:
        raise ValueError(
            f"study.probe.blocks names block {deepest}, but there are {config.model.depth}"
        )
    return Row(name, Experiment(config, exp.mesh), run, method.guide, method.init_from)


def _check_guide(row: Row, guide: Row) -> None:
    """Raises UserError where autoguidance would find no network that fits."""
    c = row.exp.config
    step, last, every = c.sample.guide.step, guide.exp.total_steps, c.checkpoint.keep_every_steps
    if step and step != last and (step > last or not every or step % every):
        raise UserError(
            f"sample.guide.step = {step}: runs of {guide.name} keep no such checkpoint; name a "
            f"multiple of checkpoint.keep_every_steps = {every}, up to {last}"
        )
    require_same_data(row.exp.pipeline, guide.exp.pipeline, f"guide = {guide.name!r}")
