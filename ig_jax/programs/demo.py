"""--mode=demo: train, sample four ways, evaluate; one table and two images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ig_jax.errors import UserError
from ig_jax.evaluation import base, image_evaluator
from ig_jax.evaluation import report as metrics_report
from ig_jax.evaluation.density_evaluator import FLOOR
from ig_jax.experiment import Experiment
from ig_jax.generation import variants
from ig_jax.guidance import Guidances
from ig_jax.io import disk_errors, files
from ig_jax.monitoring import console
from ig_jax.parallel import lock
from ig_jax.parallel.preemption import Stopped
from ig_jax.programs import guide_model, run_record
from ig_jax.training import trainer

_NAMES = {"ig": "IG", "cfg": "CFG", "autoguidance": "autoguidance"}


def title(guidances: Guidances) -> str:
    """Title of a variant in images and tables."""
    on = [f"{_NAMES[kind]} {g.scale:g}" for kind, g in guidances.items() if g.scale != 1]
    if on == ["IG 0"]:
        return "readout alone"
    return " + ".join(on) or "plain"


def _make_evaluator(exp: Experiment) -> tuple[base.Evaluator, base.HeldOut]:
    """Raises UserError where there is nothing to compare samples with."""
    evaluator, held_out = image_evaluator.make_evaluator(exp.config, exp.mesh)
    if held_out is None:
        raise UserError(
            "--mode=demo: data.source holds out no examples, which the table begins with; use "
            "--mode=train and --mode=sample, or more images"
        )
    return evaluator, held_out


def _evaluate(
    exp: Experiment, workdir: Path, evaluator: base.Evaluator, held_out: base.HeldOut
) -> tuple[dict[str, Any], dict[str, float], Any]:
    """Results by variant with the floor first, seconds of sample and evaluate, and titles."""
    c = exp.config
    step, params = run_record.load_weights(exp, workdir)
    seconds = {"sample": 0.0, "evaluate": 0.0}
    started = time.perf_counter()
    generator = exp.pipeline.generator(
        guide=guide_model.load(exp.pipeline), decode=evaluator.decode
    )
    # All rows of the table are evaluated in runs of one size, which their metrics depend on.
    together = min(len(held_out[1]), c.evaluate.num)
    floor = base.compute_in_runs(evaluator, *held_out, together)
    seconds["evaluate"] += time.perf_counter() - started
    results: dict[str, Any] = {"floor": metrics_report.spread([floor])}
    titles, drawn = {"floor": FLOOR}, {}
    ways = variants.variants(c.sample.guidances, readout=evaluator.shows_readout)
    total = len(ways) * len(c.evaluate.seeds) * c.evaluate.num
    with console.progress(total, unit="image", what="sampling") as bar:
        for name, guidances in ways.items():
            titles[name] = title(guidances)
            measured = []
            for seed in c.evaluate.seeds:
                started = time.perf_counter()
                images, labels = variants.draw_samples(
                    generator, params, c.evaluate.num, seed, bar, guidances=guidances
                )
                drawn_at = time.perf_counter()
                rows = evaluator.extract(images)
                measured.append(base.compute_in_runs(evaluator, rows, labels, together))
                seconds["sample"] += drawn_at - started
                seconds["evaluate"] += time.perf_counter() - drawn_at
                drawn.setdefault(titles[name], (images, labels))
            results[name] = metrics_report.spread(measured)
    by_title = {titles[name]: stats for name, stats in results.items()}
    evaluator.draw(workdir / "samples.png", drawn, by_title)
    evaluated = {**c.raw["evaluate"], "judged_together": together}
    results["settings"] = {**run_record.settings(exp, step), **evaluated}
    return results, seconds, titles


def run(
    exp: Experiment, workdir: Path, import_seconds: float, init_from: str | None = None
) -> dict[str, Any]:
    """Trains (or goes on training), then evaluates; writes results.json, samples.png and loss.png.

    Returns:
      What results.json holds.

    Raises:
      Stopped: a signal asked the training to stop.
      UserError: as `train.run`; nothing is held out to compare with.
    """
    with lock.held(workdir) as held, disk_errors.reported(workdir):
        started = time.perf_counter()
        evaluator, held_out = _make_evaluator(exp)  # before the training, which may take long
        making = time.perf_counter() - started
        outcome = trainer.train(exp, workdir, held, init_from)
        if outcome.stopped_by:
            raise Stopped(outcome.stopped_by)
        trainer.draw_losses(workdir)
        results, seconds, titles = _evaluate(exp, workdir, evaluator, held_out)
        seconds["evaluate"] += making
        results["seconds"] = {"import": import_seconds, **outcome.seconds, **seconds}
        files.write_json(workdir / "results.json", results)
    corner = f"n = {results['settings']['judged_together']:,}"
    console.say("\n" + metrics_report.table({titles[n]: results[n] for n in titles}, corner) + "\n")
    console.say(f"images: {workdir / 'samples.png'}, {workdir / 'loss.png'}")
    console.say(f"numbers:  {workdir / 'results.json'}")
    return results
