"""Successive halving with common random numbers.

Every candidate is measured with the same sampling seeds, and every measurement draws the same
number of samples: a Frechet distance has the same bias everywhere, and differences between
candidates lose the noise they share. After round r = 1, 2, ... a candidate still in the race has
2^(r - 1) seeds; then the best share goes on and the others cost nothing more (Jamieson and
Talwalkar, arXiv 1502.07943). No measurement is thrown away.

The config's own settings take part to the end, outside the share, so that every candidate has a
paired difference to them. Uncertainties are standard errors over seeds; with two seeds they are
rough, and they leave out that the best of many noisy candidates looks better than it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ig_jax import pytree
from ig_jax.errors import UserError
from ig_jax.io import files
from ig_jax.search.space import Candidate

SIGNS = {"lower": 1, "higher": -1}  # which direction is better -> factor that makes small good


@dataclass(frozen=True)
class Halving:
    """Rules by which candidates are compared and dropped."""

    metric: str  # the measure that decides
    better: str  # lower or higher
    rounds: int  # the last candidates are measured on 2^(rounds - 1) seeds
    # Share that goes on after a round, besides the config's own setting.
    keep: float
    first_seed: int  # sampling seeds count up from here

    def __post_init__(self):
        if self.better not in SIGNS:
            raise ValueError(f"better = {self.better!r}: must be {' or '.join(SIGNS)}")
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds}: must be at least 1")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep = {self.keep}: must lie in (0, 1]")

    def seeds(self, round_: int) -> int:
        """Seeds of a candidate after round 1, 2, ..."""
        return 2 ** (round_ - 1)

    def kept(self, challengers: int) -> int:
        """Number of the candidates other than the config's own that go on, rounded up."""
        # 0.07 * 100 is a little above 7 in floating point.
        return math.ceil(self.keep * challengers * (1 - 1e-12))

    def measurements(self, candidates: int) -> int:
        """All there is to measure for so many candidates, number 0 included."""
        total, challengers, before = 0, candidates - 1, 0
        for round_ in range(1, self.rounds + 1):
            total += (1 + challengers) * (self.seeds(round_) - before)
            challengers, before = self.kept(challengers), self.seeds(round_)
        return total


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation (n - 1) and standard error of the mean; None where n = 1."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return {"mean": mean, "std": None, "error": None}
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return {"mean": mean, "std": std, "error": std / math.sqrt(n)}


SearchRows = dict[Candidate, list[dict[str, Any]]]  # what was measured, by seed


def _parsed(record: Any) -> tuple[dict[str, Any], SearchRows]:
    """Settings and rows of a record; raises ValueError where it is not as `Search` writes it."""
    match record:
        case {"settings": dict(settings), "rows": [*rows]}:
            parsed = dict(map(_row, rows))
            # Tables and images take the measures' names from any.
            names = {frozenset(measured) for values in parsed.values() for measured in values}
            if len(parsed) == len(rows) and len(names) <= 1:
                return settings, parsed
    raise ValueError("has no settings, or other rows")


def _row(row: Any) -> tuple[Candidate, list[dict[str, Any]]]:
    match row:
        case {"candidate": dict(point), "values": [_, *_] as values}:
            if _are_numbers(point) and all(
                isinstance(v, dict) and _are_numbers(v) and type(v.get("seed")) is int
                for v in values
            ):
                return Candidate.of(point), values
    raise ValueError("a row without numbers")


def _are_numbers(values: Mapping[str, Any]) -> bool:
    return all(type(value) in (int, float) for value in values.values())


class Search:
    """A search and its record, `search.json`: whole after every measurement, continued if found.

    Raises:
      UserError: the record was made with other settings, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        compared: Sequence[Candidate],
        halving: Halving,
        settings: Mapping[str, Any],
    ):
        """
        Args:
          path: the record.
          compared: from `candidates`; number 0 is the config's own setting.
          halving: how to compare them.
          settings: whatever else the measurements depend on (space, checkpoint step, samples a
            seed, ...), as JSON can hold it; a record with others is refused.
        """
        self._path = path
        self._compared = list(compared)
        self._halving = halving
        # As it reads back from the file: lists for tuples.
        self._settings = json.loads(json.dumps({**settings, "halving": asdict(halving)}))
        self._measured: dict[Candidate, list[dict[str, float]]] = {c: [] for c in compared}
        self._dropped_after: dict[Candidate, int] = {}
        if path.exists():
            self._load()

    @property
    def total(self) -> int:
        """Measurements of the whole search."""
        return self._halving.measurements(len(self._compared))

    @property
    def finished(self) -> int:
        """Measurements that are in the record already."""
        return sum(map(len, self._measured.values()))

    def _load(self) -> None:
        remedy = "remove it or choose another workdir to search anew"
        try:
            settings, rows = _parsed(files.read_json(self._path))
        except (UserError, ValueError) as error:
            raise UserError(f"{self._path}: is no readable record of a search; {remedy}") from error
        changed = pytree.differences(settings, self._settings)
        if changed:
            raise UserError(
                f"{self._path}: was made with other settings ({'; '.join(changed)}); {remedy}"
            )
        for candidate, values in rows.items():
            if candidate not in self._measured:
                raise UserError(f"{self._path}: has {candidate}, not in this space; {remedy}")
            seeds = [measured["seed"] for measured in values]
            wanted = [self._halving.first_seed + i for i in range(len(values))]
            if seeds != wanted or not all(self._halving.metric in measured for measured in values):
                raise UserError(
                    f"{self._path}: has {candidate} with other seeds or measures than this search "
                    f"takes; {remedy}"
                )
            self._measured[candidate] = values

    def run(self, measure: Callable[[Candidate, int], Mapping[str, float]]) -> Iterator[Candidate]:
        """Does what is missing from the record, and yields a candidate after each measurement.

        Args:
          measure: (candidate, sampling seed) -> all measures, from a fixed number of samples. All
            seeds of a candidate in a round follow each other: what it compiled can be reused.

        Raises:
          UserError: the deciding measure is not among the measures.
        """
        alive = self._compared
        for round_ in range(1, self._halving.rounds + 1):
            for candidate in alive:
                values = self._measured[candidate]
                while len(values) < self._halving.seeds(round_):
                    self._add(candidate, measure)
                    yield candidate
            if round_ < self._halving.rounds:
                alive = self._next(alive, round_)

    def _add(self, candidate: Candidate, measure: Callable[..., Mapping[str, float]]) -> None:
        values = self._measured[candidate]
        seed = self._halving.first_seed + len(values)
        measured = measure(candidate, seed)
        if self._halving.metric not in measured:
            raise UserError(
                f"metric = {self._halving.metric!r}: is not measured; choose one of "
                f"{', '.join(measured)}"
            )
        values.append({"seed": seed, **measured})
        metric = self._halving.metric
        record = {"settings": self._settings, "metric": metric, "rows": self.rows()}
        files.write_json(self._path, record)

    def _next(self, alive: list[Candidate], round_: int) -> list[Candidate]:
        """Those that go on, in their old order; equally good ones by that order."""
        own, *challengers = alive
        seeds = self._halving.seeds(round_)
        ranked = sorted(challengers, key=lambda c: self._badness(c, seeds))
        for candidate in ranked[self._halving.kept(len(challengers)) :]:
            self._dropped_after[candidate] = round_
        return [c for c in alive if c not in self._dropped_after]

    def _badness(self, candidate: Candidate, seeds: int) -> float:
        """Small is good; a measure that is not finite is the worst."""
        # A continued search may hold later seeds too, which this decision must not see.
        values = [v[self._halving.metric] for v in self._measured[candidate][:seeds]]
        badness = SIGNS[self._halving.better] * sum(values) / len(values)
        return badness if math.isfinite(badness) else math.inf

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        values, own = self._measured[candidate], self._measured[self._compared[0]]
        metric = self._halving.metric
        # Number 0 comes first in every round: it has every seed that another one has.
        pairs = zip(values, own, strict=False)
        return {
            "candidate": candidate.values,
            "default": candidate == self._compared[0],
            "seeds": len(values),
            **{name: _spread([v[name] for v in values]) for name in values[0] if name != "seed"},
            "minus_default": _spread([a[metric] - b[metric] for a, b in pairs]),
            "dropped_after_round": self._dropped_after.get(candidate),
            "values": values,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Rows of measurements, best first: the longer in the search, then by the metric's mean.

        To be asked during or after `run`, which finds out who was dropped. Each row has the keys
        candidate {field: value}, default (is it the config's own), seeds, every measure {mean,
        std, error}, minus_default (the same of the metric's paired difference to the config's own
        setting), dropped_after_round (or None) and values (by seed).
        """
        measured = [c for c in self._compared if self._measured[c]]
        count = {c: len(self._measured[c]) for c in measured}
        order = sorted(measured, key=lambda c: (-count[c], self._badness(c, count[c])))
        return [self._row(candidate) for candidate in order]
