"""--mode=search: which guidance suits a checkpoint, by a race over settings of `config.sample`.

Every setting draws the same samples (noise and labels) under the same seeds; bad ones drop out
after few of them (`halving`). Scales are inputs of the compiled program, so settings that differ in
scales alone share one; intervals and settings of the sampler cost a compilation each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ig_jax import pytree
from ig_jax.checkpoint import compatibility, composed_average, stored_averages
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.config.run_config import Config
from ig_jax.config.schema import Sample
from ig_jax.errors import UserError, shown
from ig_jax.evaluation import image_evaluator
from ig_jax.evaluation import report as metrics_report
from ig_jax.experiment import Experiment
from ig_jax.generation import variants
from ig_jax.guidance import Guidances
from ig_jax.io import disk_errors
from ig_jax.monitoring import console
from ig_jax.optim import ema, power_ema
from ig_jax.parallel import lock
from ig_jax.programs import guide_model, run_record
from ig_jax.samplers.base import Sampler
from ig_jax.search import report as search_report
from ig_jax.search import space, successive_halving
from ig_jax.search.space import Candidate
from ig_jax.search.successive_halving import Halving, Search
from ig_jax.types import Params

LENGTH = "sigma_rel"  # the field of a search over averages of the weights
LOCK = ".search.lock"
_SHOWN = 10  # best settings in the table


class Setting(NamedTuple):
    """The settings that a candidate stands for."""

    guidances: Guidances
    sampler: Sampler
    readout: int | None
    weights: str


def numbers(s: Sample, readout: int | None) -> dict[str, float]:
    """Values that a search may vary: 'ig.scale', ..., 'sampler.num_steps', 'readout', 'sigma_rel'.

    Args:
      s: has their configured values; 'sigma_rel' is there where its weights are such an average.
      readout: the one of IG, where the network has any.
    """
    ends = ("scale", "low", "high")
    guidances = {kind: {e: getattr(g, e) for e in ends} for kind, g in s.guidances.items()}
    settings = {f.name: getattr(s.sampler, f.name) for f in fields(s.sampler)}
    of_sampler = {name: value for name, value in settings.items() if type(value) in (int, float)}
    others = {"readout": readout, LENGTH: ema.length(s.weights)}
    known = {name: value for name, value in others.items() if value is not None}
    return pytree.flatten({**guidances, "sampler": of_sampler}) | known


def apply_candidate(s: Sample, candidate: Candidate, readouts: tuple[int, ...]) -> Setting:
    """The config's setting with the candidate's values; a readout only where it names one.

    Raises:
      ValueError: there is no such guidance, sampler, readout or average.
    """
    values = pytree.unflatten(candidate.values)
    readout = values.pop("readout", None)
    weights = ema.name_of_length(values.pop(LENGTH)) if LENGTH in values else s.weights
    if LENGTH in candidate.values and ema.length(weights) is None:
        raise ValueError(f"must be {power_ema.SHORTEST} to {power_ema.LONGEST}")
    if readout is not None and readout not in readouts:
        raise ValueError(f"must name a depth of model.readouts = {shown(readouts)}")
    given = values.pop("sampler", {})
    of_sampler = {name: type(getattr(s.sampler, name))(value) for name, value in given.items()}
    guidances = {kind: replace(g, **values.get(kind, {})) for kind, g in s.guidances.items()}
    depth = None if readout is None else int(readout)
    return Setting(guidances, replace(s.sampler, **of_sampler), depth, weights)


def compared(c: Config) -> list[Candidate]:
    """The candidates of a search, the config's own setting first.

    Raises:
      UserError: the space is empty, or holds a setting that there cannot be.
    """
    if LENGTH in c.search.space.values and ema.length(c.sample.weights) is None:
        raise UserError(
            f"search.space.values.{LENGTH}: a search over averages begins at the config's own; "
            f"name one in sample.weights, such as {ema.name_of_length(0.1)}"
        )
    found = space.candidates(c.search.space, c.search.first_seed, numbers(c.sample, c.readout))
    for candidate in found:
        try:
            apply_candidate(c.sample, candidate, c.model.readouts)
        except ValueError as error:
            raise UserError(f"search.space.values: {candidate}: {error}") from error
    return found


def _race(exp: Experiment, workdir: Path, step: int, measures: Collection[str]) -> Search:
    c = exp.config.search
    if c.metric not in metrics_report.BETTER or c.metric not in measures:
        known = [name for name in measures if name in metrics_report.BETTER]
        raise UserError(f"search.metric = {c.metric!r}: must be one of {', '.join(known)}")
    halving = Halving(c.metric, metrics_report.BETTER[c.metric], c.rounds, c.keep, c.first_seed)
    settings = {**run_record.settings(exp, step), "search": exp.config.raw["search"]}
    candidates = compared(exp.config)
    return successive_halving.Search(workdir / "search.json", candidates, halving, settings)


def _compose(exp: Experiment, workdir: Path, candidates: list[Candidate]) -> None:
    """Composes the averages of candidates that are neither stored nor composed yet."""
    with closing(checkpoint_manager.of_run(workdir, "--workdir")) as checkpoints:
        step, _ = checkpoints.newest(arrays=("ema",))
        checkpoints.require(step, exp.config.raw, compatibility.SAMPLES)
        for length in sorted({c.values[LENGTH] for c in candidates}):
            name = ema.name_of_length(length)
            if not composed_average.state_file(workdir, step, name).path.exists():
                stored_averages.compose(checkpoints, step, name, exp.replicated_params)


def run(exp: Experiment, workdir: Path) -> list[dict[str, Any]]:
    """Searches for the newest checkpoint of `workdir`; writes search.json and search.png there.

    Returns:
      The rows of search.json, best first.

    Raises:
      UserError: the workdir holds no checkpoint, or another search; the space is empty; another
        program searches there; the disk is full or gone.
    """
    # Training may go on meanwhile: it writes other files.
    with lock.held(workdir, LOCK), disk_errors.reported(workdir):
        return _search(exp, workdir)


def _weights(
    exp: Experiment, workdir: Path, step: int, configured: Params
) -> Callable[[str], Params]:
    """Returns a reader of weights at this step, by name; it keeps the last it read."""

    @lru_cache(maxsize=1)
    def other(which: str) -> Params:
        return run_record.weights_at(exp, workdir, step, which)

    return lambda which: configured if which == exp.config.sample.weights else other(which)


def _search(exp: Experiment, workdir: Path) -> list[dict[str, Any]]:
    c = exp.config.search
    if LENGTH in c.space.values:
        _compose(exp, workdir, compared(exp.config))
    step, params = run_record.load_weights(exp, workdir)
    weights = _weights(exp, workdir, step, params)
    evaluator, _ = image_evaluator.make_evaluator(exp.config, exp.mesh)
    search = _race(exp, workdir, step, evaluator.metrics)
    generator = exp.pipeline.generator(guide=_guide(exp), decode=evaluator.decode)
    evaluator.rows(generator.shape)  # raises now what does not fit
    done, total = search.finished * c.num, search.total * c.num
    with console.progress(total, initial=done, unit="image", what="searching") as bar:

        def measure(candidate: Candidate, seed: int) -> dict[str, float]:
            chosen = apply_candidate(exp.config.sample, candidate, exp.config.model.readouts)
            images, labels = variants.draw_samples(
                *(generator, weights(chosen.weights), c.num, seed, bar),
                guidances=chosen.guidances,
                sampler=chosen.sampler,
                readout=chosen.readout,
            )
            return evaluator.compute(evaluator.extract(images), labels)

        for _ in search.run(measure):
            bar.set_postfix_str(f"best: {search.rows()[0]['candidate']}", refresh=False)
    rows = search.rows()
    image = workdir / "search.png"
    search_report.heat_map(image, rows, c.metric, metrics_report.BETTER[c.metric], c.space.method)
    shown = {name: metrics_report.METRICS[name] for name in evaluator.metrics}
    console.say("\n" + search_report.search_table(rows, shown, c.metric, _SHOWN) + "\n")
    console.say(f"± is the standard error over seeds of {c.num} samples; 'minus config' is paired")
    console.say(f"all settings: {workdir / 'search.json'}, image: {image}")
    return rows


def _guide(exp: Experiment) -> Any:
    """The other network of autoguidance if it is on in the config or anywhere in the space."""
    s = exp.config.sample
    scales = exp.config.search.space.values.get("autoguidance.scale", ())
    varied = any(scale != 1 for scale in (s.autoguidance.scale, *scales))
    return guide_model.load(exp.pipeline, wanted=varied)
