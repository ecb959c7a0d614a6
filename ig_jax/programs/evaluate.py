"""--mode=evaluate: samples of a checkpoint, or those of a file or folder, against real ones.

Samples go straight into features, which are kept in rows on the disk while they come: a run that
was killed goes on with the samples that are left, and ends with the numbers of one that was not. A
result is a record of everything that it hangs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax import pytree
from ig_jax.checkpoint import compatibility, versions
from ig_jax.errors import UserError
from ig_jax.evaluation import report as metrics_report
from ig_jax.evaluation.base import Evaluator, HeldOut, compute_in_runs
from ig_jax.evaluation.density_evaluator import FLOOR
from ig_jax.evaluation.feature_extractor import Rows
from ig_jax.evaluation.image_evaluator import ImageEvaluator, make_evaluator
from ig_jax.experiment import Experiment
from ig_jax.generation.batches import labels_of
from ig_jax.generation.batches import sample_batches as batches_of
from ig_jax.generation.cost import cost as cost_of
from ig_jax.generation.sample_files import SavedSamples
from ig_jax.guidance import AT_EVERY_EVALUATION
from ig_jax.io import disk_errors, files
from ig_jax.io.row_store import RowStore
from ig_jax.monitoring import console
from ig_jax.parallel import lock
from ig_jax.parallel.processes import barrier, from_process_0, process_slice
from ig_jax.programs import guide_model, run_record

RESULTS = "results.json"
_STATISTICS = ("mean", "std")
_FEWEST = 10  # samples, for any measure to mean something


Seen = tuple[RowStore, np.ndarray | None]  # rows of a set of samples, and its labels


class _Evaluation:
    """One evaluation and its folder, which its settings name."""

    def __init__(self, workdir: Path, evaluator: Evaluator, settings: dict[str, Any], num: int):
        self.folder = run_record.folder(workdir / "evaluations", settings)
        self.evaluator, self.settings, self.num = evaluator, settings, num

    @property
    def file(self) -> Path:
        return self.folder / RESULTS

    def done(self) -> dict[str, Any] | None:
        """The record of an evaluation that came to its end; a damaged one is made again."""
        if not self.file.exists():
            return None
        with suppress(UserError):
            record = files.read_json(self.file)
            made_of = (self.num, compatibility.as_json(self.settings))
            if _is_record(record) and (record["samples"], record["settings"]) == made_of:
                return record
        console.say(f"{self.file}: is damaged; it is made again")
        return None

    def rows(
        self,
        name: str,
        shape: tuple[int, ...],
        batches: Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]],
        bar: Any,
    ) -> RowStore:
        """Extracts features of all samples to the disk; resumes where an earlier run stopped.

        Args:
          name: of the set of samples.
          shape: of one of them.
          batches: yields (indices, samples) of the indices that it is given.
        """
        store = RowStore(self.folder / f".{name}", self.num, self.evaluator.rows(shape))
        if jax.process_index() == 0:
            store.create()
        barrier(f"{name} begun")
        own = np.array(process_slice(self.num))
        missing = own[~store.done(own)]
        bar.update(len(own) - len(missing))
        for indices, images in batches(missing):
            store.write(indices, self.evaluator.extract(images))
            bar.update(len(indices))
        barrier(f"{name} seen")
        return store

    def finish(
        self, seen: Sequence[Seen], held_out: HeldOut | None = None, **rest: Any
    ) -> dict[str, Any]:
        """Measures each set of samples, writes results.json, and clears the rows away.

        `held_out` is evaluated too, and larger sets of samples also in runs of its size.
        """
        measured, in_runs, errors = [], [], []
        size = len(held_out[1]) if held_out else 0
        for store, labels in seen:
            rows: Rows = {name: store.read(name) for name in store.names}
            measured.append(self.evaluator.compute(rows, labels))
            if isinstance(self.evaluator, ImageEvaluator):
                errors.append(self.evaluator.standard_errors(rows, measured[-1]))
            if 0 < size < self.num:
                in_runs.append(compute_in_runs(self.evaluator, rows, labels, size))
        if held_out:
            rest["floor"] = metrics_report.spread([self.evaluator.compute(*held_out)])
            rest["floor_samples"] = size
        if in_runs:
            rest["in_runs_of_the_floor"] = metrics_report.spread(in_runs)
        record = {
            "measures": metrics_report.spread(measured),
            "each": measured,
            "standard_errors": errors,  # of each
            "samples": self.num,
            **rest,
            **self.evaluator.record(),
            "settings": self.settings,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": versions.versions(),
        }
        files.write_json(self.file, record)
        for store, _ in seen:
            store.remove()
        return record

    def run(
        self, see: Callable[[], tuple[Sequence[Seen], dict[str, Any]]]
    ) -> dict[str, Any] | None:
        """The record, in process 0, reported; made of what `see` gives unless it is there already.

        `see` gives sets of samples, and what else the record is to hold.

        Raises:
          UserError: another program makes the same evaluation; the disk is full or gone.
        """
        with lock.held(self.folder), disk_errors.reported(self.folder):
            # Process 0 may be about to write it, so that the others go by what it finds.
            record = self.done() if jax.process_index() == 0 else None
            if not from_process_0(record is not None):
                seen, rest = see()
                if jax.process_index() == 0:
                    record = self.finish(seen, **rest)
                barrier("measured")
        if jax.process_index() == 0:
            _say(record, self.file)
        return record


def _is_record(record: Any) -> bool:
    """Returns whether this is what `_Evaluation.finish` writes, as far as it is used again."""
    match record:
        case {
            "measures": spread,
            "each": [_, *_],
            "samples": int(),
            "of": str(),
            "settings": dict(),
        }:
            floor = record.get("floor") or spread
            whole = _is_spread(spread) and _is_spread(floor)
            return whole and set(floor) & set(metrics_report.METRICS) <= set(spread)
    return False


def _is_spread(spread: Any) -> bool:
    """Returns whether this is {'fd': {'mean', 'std'}, ...}, as `measures.spread` gives it."""
    return (
        isinstance(spread, dict)
        and len(spread) > 0
        and all(
            isinstance(stats, dict) and all(type(stats.get(n)) in (int, float) for n in _STATISTICS)
            for stats in spread.values()
        )
    )


def _say(record: Mapping[str, Any], where: Path) -> None:
    """A table, a line that says how it was made, and where all of it is written."""
    rows = {f"samples (n = {record['samples']:,})": record["measures"]}
    if record.get("floor"):
        n = record.get("floor_samples", 0)  # records of older versions lack it
        rows = {f"{FLOOR} (n = {n:,})": record["floor"], **rows}
        if "in_runs_of_the_floor" in record:
            rows[f"samples (n = {n:,})"] = record["in_runs_of_the_floor"]
    console.say(metrics_report.table(rows))
    console.say(metrics_report.summary(record))
    if record.get("standard_errors"):  # older records lack them
        each = metrics_report.intervals(record["each"][0], record["standard_errors"][0])
        console.say(f"95 % intervals of one such set of samples, for this network: {each}")
    console.say(f"numbers: {where}")


def _how(exp: Experiment, step: int, cost: Mapping[str, int] | None) -> str:
    """'50,000 samples with random labels of step 400,000 (ema), ...' for the line of a result."""
    c = exp.config
    s = c.sample
    on = [
        f"{name} {g.scale:g} on [{g.low:g}, {g.high:g}]"
        for name, g in s.guidances.items()
        if g.scale != 1
    ]
    groups = s.token_groups
    if groups.share:
        redrawn = " at each step" if groups.each_step else ""
        on.append(f"{groups.share:g} of the tokens apart{redrawn}")
    null = s.null_class
    if s.cfg.scale != 1 and null != AT_EVERY_EVALUATION:
        on.append(f"null class {null}")
    seeds = f" for each of {len(c.evaluate.seeds)} seeds" if len(c.evaluate.seeds) > 1 else ""
    calls = f"{cost['evaluations']} evaluations an image" if cost else "adaptive steps"
    return (
        f"{c.evaluate.num:,} samples{seeds} with {s.labels} labels of step {step:,} ({s.weights}); "
        f"{type(s.sampler).__name__} {s.sampler.num_steps}, {', '.join(on) or 'no guidance'}, "
        f"{calls}"
    )


def _of_checkpoint(
    exp: Experiment, workdir: Path, evaluator: Evaluator, held_out: HeldOut | None
) -> dict[str, Any] | None:
    c = exp.config
    step, params = run_record.load_weights(exp, workdir)
    generator = exp.pipeline.generator(
        guide=guide_model.load(exp.pipeline), decode=evaluator.decode
    )
    network = {"network_sha256": pytree.digest(params)}
    decisive = {name: c.raw["evaluate"][name] for name in ("num", "seeds")}
    settings = {
        **run_record.settings(exp, step),
        **evaluator.record(),
        **network,
        "evaluate": decisive,
    }
    del settings["seed"]  # of --mode=sample; here there may be several
    job = _Evaluation(workdir, evaluator, settings, c.evaluate.num)

    def see() -> tuple[list[Seen], dict[str, Any]]:
        seen, total = [], len(process_slice(job.num)) * len(c.evaluate.seeds)
        with console.progress(total, unit="image", what="evaluating") as bar:
            for seed in c.evaluate.seeds:

                def batches(missing: np.ndarray, seed: int = seed) -> Iterator[tuple]:
                    for drawn in batches_of(generator, params, seed, missing):
                        yield drawn.indices, drawn.images

                labels = labels_of(c.sample, exp.num_classes, seed, np.arange(job.num))
                seen.append((job.rows(f"seed{seed}", generator.shape, batches, bar), labels))
        cost = cost_of(generator)
        rest = {
            "of": _how(exp, step, cost),
            "held_out": held_out,
            "an_image": cost,
            "rounding": c.data.codec.rounding,
            **network,
        }
        return seen, rest

    return job.run(see)


def _of_files(exp: Experiment, workdir: Path, evaluator: Evaluator) -> dict[str, Any] | None:
    field, path = "evaluate.samples", Path(exp.config.evaluate.samples)
    if not isinstance(evaluator, ImageEvaluator):
        raise UserError(f"{field} = {str(path)!r}: points of a known density are not evaluated so")
    grey = evaluator.training is not None and evaluator.training.shape[-1] == 1
    samples = SavedSamples(path, field, channels=1 if grey else 3)
    if samples.left_out:
        console.say(samples.remark())
    if len(samples) < _FEWEST:
        raise UserError(f"{field} = {str(path)!r}: {len(samples)} samples are too few to evaluate")
    settings = {
        "samples": str(samples.path),
        "sha256": samples.digest(),
        **evaluator.record(),
    }
    job = _Evaluation(workdir, evaluator, settings, len(samples))
    size = exp.config.sample.batch_size

    def batches(missing: np.ndarray) -> Iterator[tuple]:
        for start in range(0, len(missing), size):
            indices = missing[start : start + size]
            yield indices, samples.read(indices)

    def see() -> tuple[list[Seen], dict[str, Any]]:
        with console.progress(len(process_slice(job.num)), unit="image", what="evaluating") as bar:
            rows = job.rows("samples", samples.shape, batches, bar)
        return [(rows, samples.labels)], {"of": f"{len(samples):,} samples of {samples.path}"}

    return job.run(see)


def run(exp: Experiment, workdir: Path) -> dict[str, Any] | None:
    """Judges the newest checkpoint, or `evaluate.samples`; writes results.json.

    It is in evaluations/<settings>/ of the workdir.

    Returns:
      The record, in process 0.

    Raises:
      UserError: a checkpoint, the samples, or what evaluating needs is missing; the disk is full.
    """
    with disk_errors.reported(workdir):
        evaluator, held_out = make_evaluator(exp.config, exp.mesh)
        if exp.config.evaluate.samples:
            return _of_files(exp, workdir, evaluator)
        return _of_checkpoint(exp, workdir, evaluator, held_out)
