"""The whole story in one command: train, sample four ways, judge, one table and two pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ig_jax import evaluate, figures, guide, judge, lock, logs, measures, sample, storage, train
from ig_jax.build import Experiment
from ig_jax.density import FLOOR
from ig_jax.drawing import Generator
from ig_jax.formats import files
from ig_jax.guidance import Guidances
from ig_jax.stopping import Stopped

NAMES = {"ig": "IG", "cfg": "CFG", "autoguidance": "autoguidance"}


def title(guidances: Guidances) -> str:
    """How a variant is called in pictures and tables."""
    on = [f"{NAMES[kind]} {g.scale:g}" for kind, g in guidances.items() if g.scale != 1]
    if on == ["IG 0"]:
        return "readout alone"
    return " + ".join(on) or "plain"


def plot_losses(metrics: list[dict[str, Any]], path: Path) -> None:
    """Every loss term against images seen, as PNG."""
    figure = figures.blank(7.0, 4.0)
    axes = figure.subplots()
    names = {"loss/flow": "final output", "loss/internal_guidance": "intermediate readout"}
    for key in dict.fromkeys(n for m in metrics for n in m if n.startswith("loss/")):
        points = [(m["images"], m[key]) for m in metrics if {"images", key} <= m.keys()]
        axes.plot(*zip(*points, strict=True), label=names.get(key, key.removeprefix("loss/")))
    axes.set(xlabel="images seen", ylabel="loss, unweighted", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def _judge(exp: Experiment, workdir: Path) -> tuple[dict[str, Any], dict[str, float], Any]:
    """Results by variant with the floor first, seconds of sample and evaluate, and titles."""
    c = exp.config
    step, params = sample.load_weights(exp, workdir)
    seconds = {"sample": 0.0, "evaluate": 0.0}
    started = time.perf_counter()
    judging, held_out = judge.make_judge(exp)
    generator = Generator(exp, guide.load(exp), judging.decode)
    # All rows of the table are judged in runs of one size, which their measures depend on.
    together = min(len(held_out[1]), c.evaluate.num)
    floor = judge.measure_in_runs(judging, *held_out, together)
    seconds["evaluate"] += time.perf_counter() - started
    results: dict[str, Any] = {"floor": measures.spread([floor])}
    titles, drawn = {"floor": FLOOR}, {}
    ways = evaluate.variants(exp, readout=judging.shows_readout)
    total = len(ways) * len(c.evaluate.seeds) * c.evaluate.num
    with logs.progress(total, unit="image", what="sampling") as bar:
        for name, guidances in ways.items():
            titles[name] = title(guidances)
            measured = []
            for seed in c.evaluate.seeds:
                started = time.perf_counter()
                images, labels = evaluate.draw(
                    generator, params, c.evaluate.num, seed, bar, guidances=guidances
                )
                drawn_at = time.perf_counter()
                rows = judging.look(images)
                measured.append(judge.measure_in_runs(judging, rows, labels, together))
                seconds["sample"] += drawn_at - started
                seconds["evaluate"] += time.perf_counter() - drawn_at
                drawn.setdefault(titles[name], (images, labels))
            results[name] = measures.spread(measured)
    by_title = {titles[name]: stats for name, stats in results.items()}
    judging.draw(workdir / "samples.png", drawn, by_title)
    judged = {**c.raw["evaluate"], "judged_together": together}
    results["settings"] = {**sample.settings(exp, step), **judged}
    return results, seconds, titles


def run(exp: Experiment, workdir: Path, import_seconds: float) -> dict[str, Any]:
    """Trains (or goes on training), then judges; writes results.json, samples.png and loss.png.

    Returns:
      What results.json holds.

    Raises:
      Stopped: a signal asked the training to stop.
      UserError: as `train.run`.
    """
    with lock.held(workdir) as held, storage.errors_told(workdir):
        outcome = train.train(exp, workdir, held)
        if outcome.stopped_by:
            raise Stopped(outcome.stopped_by)
        plot_losses(logs.read_metrics(workdir), workdir / "loss.png")
        results, seconds, titles = _judge(exp, workdir)
        results["seconds"] = {"import": import_seconds, **outcome.seconds, **seconds}
        files.write_json(workdir / "results.json", results)
    corner = f"n = {results['settings']['judged_together']:,}"
    logs.say("\n" + measures.table({titles[n]: results[n] for n in titles}, corner) + "\n")
    logs.say(f"pictures: {workdir / 'samples.png'}, {workdir / 'loss.png'}")
    logs.say(f"numbers:  {workdir / 'results.json'}")
    return results
