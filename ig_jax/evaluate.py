"""--mode=evaluate: samples of a checkpoint, or those of a file or folder, judged against real ones.

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

from ig_jax import (
    checkpoint,
    compatible,
    drawing,
    guidance,
    guide,
    lock,
    logs,
    measures,
    sample,
    sharding,
    storage,
    tree,
)
from ig_jax.build import Experiment
from ig_jax.density import FLOOR
from ig_jax.drawing import Generator
from ig_jax.errors import UserError
from ig_jax.formats import files
from ig_jax.formats.row_store import RowStore
from ig_jax.guidance import Guidance, Guidances
from ig_jax.judge import AnyJudge, HeldOut, Judge, make_judge, measure_in_runs
from ig_jax.look import Rows, joined
from ig_jax.sample_files import Found
from ig_jax.types import Params

RESULTS = "results.json"
STATISTICS = ("mean", "std")
FEWEST = 10  # samples, for any measure to mean something


def variants(exp: Experiment, *, readout: bool = False) -> dict[str, Guidances]:
    """Name -> guidances: none, each that the config has on alone, IG with CFG.

    Names join the kinds by '_': plain, ig, cfg, autoguidance, ig_cfg. With `readout` the first is
    'readout': the early head alone, which is IG at scale 0.
    """
    given = exp.config.sample.guidances
    on = {kind for kind, g in given.items() if g.scale != 1}
    wanted = [(), ("ig",), ("cfg",), ("autoguidance",), ("ig", "cfg")]
    found = {
        "_".join(kinds) or "plain": guidance.only(given, kinds)
        for kinds in wanted
        if on >= set(kinds)
    }
    alone = {"readout": guidance.only(given, ()) | {"ig": Guidance(0.0, 0.0, 1.0)}}
    return (alone if readout and "ig" in on else {}) | found


def draw(
    generator: Generator, params: Params, num: int, seed: int, bar: Any, **chosen: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(decoded samples, labels) of the first `num` samples under `seed`.

    `chosen` may name guidances and a sampler, as for `Generator`.
    """
    own, parts = np.array(sharding.mine(num)), []
    for part in sample.batches(generator, params, seed, own, **chosen):
        parts.append(part)
        bar.update(len(part.indices) * jax.process_count())
    images, labels = (np.concatenate([p[i] for p in parts]) for i in (1, 2))
    return sharding.everybodys(images, num), sharding.everybodys(labels, num)


Seen = tuple[RowStore, np.ndarray | None]  # rows of a set of samples, and its labels


class _Evaluation:
    """One evaluation and its folder, which its settings name."""

    def __init__(self, workdir: Path, judge: AnyJudge, settings: dict[str, Any], num: int):
        self.folder = sample.folder(workdir / "evaluations", settings)
        self.judge, self.settings, self.num = judge, settings, num

    @property
    def file(self) -> Path:
        return self.folder / RESULTS

    def done(self) -> dict[str, Any] | None:
        """The record of an evaluation that came to its end; a damaged one is made again."""
        if not self.file.exists():
            return None
        with suppress(UserError):
            record = files.read_json(self.file)
            made_of = (self.num, compatible.plain(self.settings))
            if _is_record(record) and (record["samples"], record["settings"]) == made_of:
                return record
        logs.say(f"{self.file}: is damaged; it is made again")
        return None

    def rows(
        self,
        name: str,
        shape: tuple[int, ...],
        batches: Callable[[np.ndarray], Iterator[tuple[np.ndarray, np.ndarray]]],
        bar: Any,
    ) -> RowStore:
        """What the judge keeps of all samples, on the disk; goes on where a run before stopped.

        Args:
          name: of the set of samples.
          shape: of one of them.
          batches: yields (indices, samples) of the indices that it is given.
        """
        store = RowStore(self.folder / f".{name}", self.num, self.judge.rows(shape))
        if jax.process_index() == 0:
            store.create()
        sharding.meet(f"{name} begun")
        own = np.array(sharding.mine(self.num))
        missing = own[~store.done(own)]
        bar.update(len(own) - len(missing))
        for indices, images in batches(missing):
            store.write(indices, self.judge.look(images))
            bar.update(len(indices))
        sharding.meet(f"{name} seen")
        return store

    def finish(
        self, seen: Sequence[Seen], held_out: HeldOut | None = None, **rest: Any
    ) -> dict[str, Any]:
        """Measures each set of samples, writes results.json, and clears the rows away.

        `held_out` is judged too, and larger sets of samples also in runs of its size.
        """
        measured, in_runs = [], []
        size = len(held_out[1]) if held_out else 0
        for store, labels in seen:
            rows: Rows = {name: store.read(name) for name in store.names}
            measured.append(self.judge.measure(rows, labels))
            if 0 < size < self.num:
                in_runs.append(measure_in_runs(self.judge, rows, labels, size))
        if held_out:
            rest["floor"] = measures.spread([self.judge.measure(*held_out)])
            rest["floor_samples"] = size
        if in_runs:
            rest["in_runs_of_the_floor"] = measures.spread(in_runs)
        record = {
            "measures": measures.spread(measured),
            "each": measured,
            "samples": self.num,
            **rest,
            **self.judge.record(),
            "settings": self.settings,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": checkpoint.versions(),
        }
        files.write_json(self.file, record)
        for store, _ in seen:
            store.remove()
        return record

    def run(
        self, see: Callable[[], tuple[Sequence[Seen], dict[str, Any]]]
    ) -> dict[str, Any] | None:
        """The record, in process 0, told; made of what `see` gives unless it is there already.

        `see` gives sets of samples, and what else the record is to hold.

        Raises:
          UserError: another program makes the same evaluation; the disk is full or gone.
        """
        with lock.held(self.folder), storage.errors_told(self.folder):
            # Process 0 may be about to write it, so that the others go by what it finds.
            record = self.done() if jax.process_index() == 0 else None
            if not sharding.first_says(record is not None):
                seen, rest = see()
                if jax.process_index() == 0:
                    record = self.finish(seen, **rest)
                sharding.meet("measured")
        if jax.process_index() == 0:
            _say(record, self.file)
        return record


def _is_record(found: Any) -> bool:
    """Whether this is what `_Evaluation.finish` writes, as far as it is used again."""
    match found:
        case {
            "measures": spread,
            "each": [_, *_],
            "samples": int(),
            "of": str(),
            "settings": dict(),
        }:
            floor = found.get("floor") or spread
            told = _is_spread(spread) and _is_spread(floor)
            return told and set(floor) & set(measures.MEASURES) <= set(spread)
    return False


def _is_spread(found: Any) -> bool:
    """Whether this is {'fd': {'mean', 'std'}, ...}, as `measures.spread` gives it."""
    return (
        isinstance(found, dict)
        and len(found) > 0
        and all(
            isinstance(stats, dict) and all(type(stats.get(n)) in (int, float) for n in STATISTICS)
            for stats in found.values()
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
    logs.say(measures.table(rows))
    logs.say(measures.sentence(record))
    logs.say(f"numbers: {where}")


def _how(exp: Experiment, step: int, cost: Mapping[str, int] | None) -> str:
    """'50,000 samples with random labels of step 400,000 (ema), ...' for the line of a result."""
    c = exp.config
    s = c.sample
    on = [
        f"{name} {g.scale:g} on [{g.low:g}, {g.high:g}]"
        for name, g in s.guidances.items()
        if g.scale != 1
    ]
    seeds = f" for each of {len(c.evaluate.seeds)} seeds" if len(c.evaluate.seeds) > 1 else ""
    calls = f"{cost['evaluations']} evaluations an image" if cost else "adaptive steps"
    return (
        f"{c.evaluate.num:,} samples{seeds} with {s.labels} labels of step {step:,} ({s.weights}); "
        f"{type(s.sampler).__name__} {s.sampler.num_steps}, {', '.join(on) or 'no guidance'}, "
        f"{calls}"
    )


def _of_checkpoint(
    exp: Experiment, workdir: Path, judge: AnyJudge, held_out: HeldOut | None
) -> dict[str, Any] | None:
    c = exp.config
    step, params = sample.load_weights(exp, workdir)
    generator = Generator(exp, guide.load(exp), judge.decode)
    network = {"network_sha256": tree.digest(params)}
    decisive = {name: c.raw["evaluate"][name] for name in ("num", "seeds")}
    settings = {**sample.settings(exp, step), **judge.record(), **network, "evaluate": decisive}
    del settings["seed"]  # of --mode=sample; here there may be several
    job = _Evaluation(workdir, judge, settings, c.evaluate.num)

    def see() -> tuple[list[Seen], dict[str, Any]]:
        seen, total = [], len(sharding.mine(job.num)) * len(c.evaluate.seeds)
        with logs.progress(total, unit="image", what="evaluating") as bar:
            for seed in c.evaluate.seeds:

                def batches(missing: np.ndarray, seed: int = seed) -> Iterator[tuple]:
                    for drawn in sample.batches(generator, params, seed, missing):
                        yield drawn.indices, drawn.images

                labels = sample.labels_of(exp.config, seed, np.arange(job.num))
                seen.append((job.rows(f"seed{seed}", generator.shape, batches, bar), labels))
        cost = drawing.cost(generator)
        rest = {
            "of": _how(exp, step, cost),
            "held_out": held_out,
            "an_image": cost,
            "rounding": c.data.codec.rounding,
            **network,
        }
        return seen, rest

    return job.run(see)


def _of_files(exp: Experiment, workdir: Path, judge: AnyJudge) -> dict[str, Any] | None:
    field, path = "evaluate.samples", Path(exp.config.evaluate.samples)
    if not isinstance(judge, Judge):
        raise UserError(f"{field} = {str(path)!r}: points of a known density are not judged so")
    grey = judge.training is not None and judge.training.shape[-1] == 1
    found = Found(path, field, channels=1 if grey else 3)
    if found.left_out:
        logs.say(found.remark())
    if len(found) < FEWEST:
        raise UserError(f"{field} = {str(path)!r}: {len(found)} samples are too few to judge")
    settings = {
        "samples": str(found.path),
        "sha256": found.digest(),
        **judge.record(),
    }
    job = _Evaluation(workdir, judge, settings, len(found))
    size = exp.config.sample.batch_size

    def batches(missing: np.ndarray) -> Iterator[tuple]:
        for start in range(0, len(missing), size):
            indices = missing[start : start + size]
            yield indices, found.read(indices)

    def see() -> tuple[list[Seen], dict[str, Any]]:
        with logs.progress(len(sharding.mine(job.num)), unit="image", what="evaluating") as bar:
            rows = job.rows("samples", found.shape, batches, bar)
        return [(rows, found.labels)], {"of": f"{len(found):,} samples of {found.path}"}

    return job.run(see)


class WhileTraining:
    """Judges a few samples of the weights as they are; guided as the config says.

    Without autoguidance: its other network need not exist yet while this one trains.
    """

    def __init__(self, exp: Experiment):
        self.exp, self.num = exp, exp.config.evaluate.while_training.num
        self.judge, _ = make_judge(exp)
        self.generator = Generator(exp, decode=self.judge.decode)
        self.judge.rows(self.generator.shape)  # raises now, not after hours, what does not fit
        self.guidances = guidance.only(exp.config.sample.guidances, ("ig", "cfg"))

    def measure(self, params: Params) -> dict[str, float]:
        """{'eval/fid', ...} of the first samples under the first seed of evaluation."""
        own, seed = np.array(sharding.mine(self.num)), self.exp.config.evaluate.seeds[0]
        drawn = sample.batches(self.generator, params, seed, own, guidances=self.guidances)
        seen = []
        with logs.progress(len(own), unit="image", what="evaluating") as bar:
            for batch in drawn:
                seen.append(self.judge.look(batch.images))
                bar.update(len(batch.indices))
        rows = {name: sharding.everybodys(own, self.num) for name, own in joined(seen).items()}
        labels = sample.labels_of(self.exp.config, seed, np.arange(self.num))
        return {f"eval/{name}": value for name, value in self.judge.measure(rows, labels).items()}


def run(exp: Experiment, workdir: Path) -> dict[str, Any] | None:
    """Judges the newest checkpoint, or `evaluate.samples`; writes results.json.

    It is in evaluations/<settings>/ of the workdir.

    Returns:
      The record, in process 0.

    Raises:
      UserError: a checkpoint, the samples, or what judging needs is missing; the disk is full.
    """
    with storage.errors_told(workdir):
        judge, held_out = make_judge(exp)
        if exp.config.evaluate.samples:
            return _of_files(exp, workdir, judge)
        return _of_checkpoint(exp, workdir, judge, held_out)
