"""The cells of a study, a method under a seed each: trained, measured, each whole or absent.

A cell has a folder: the run's workdir, if the method has runs of its own, with `cell.json` (what
its numbers depend on), `trained.json` (what training took) and `row.json` (its measures). Several
processes may work in one study: a lock keeps them out of each other's cells, and a killed one
leaves nothing that the next one does not go on from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ig_jax.errors import UserError
from ig_jax.io import disk_errors, files
from ig_jax.monitoring import console
from ig_jax.monitoring.throughput import NonFiniteLoss
from ig_jax.parallel import lock
from ig_jax.parallel.preemption import Stopped
from ig_jax.study.measures import Bench, cost, weights
from ig_jax.study.methods import Row, changes
from ig_jax.training import trainer
from ig_jax.training.step import Programs, SeededPrograms
from ig_jax.types import Params

LOCK = ".study.lock"
CELL, TRAINED, ROW = "cell.json", "trained.json", "row.json"
WAIT = 5.0  # seconds until cells in use are tried again


class Cells:
    """All methods under all seeds, in one folder."""

    def __init__(self, folder: Path, rows: Mapping[str, Row], seeds: tuple[int, ...], bench: Bench):
        self._folder, self._rows, self._seeds, self._bench = folder, rows, seeds, bench
        self._compiled: tuple[str, SeededPrograms] | None = None  # of the method of this name

    def folder(self, method: str, seed: int) -> Path:
        return self._folder / "cells" / method / f"seed_{seed}"

    def fill(self) -> None:
        """Trains and measures what is missing; returns when every cell is there.

        Raises:
          Stopped: a signal asked training to stop.
          UserError: a cell was made with other settings; runs did not come to their end, and all
            others did.
        """
        # By methods: the runs of one share their compiled program.
        pending = [(row, seed) for row in self._rows.values() for seed in self._seeds]
        for row, seed in pending:  # before hours are spent
            self._is_same(row, seed)
        done = [(row, seed) for row, seed in pending if self._is_done(row, seed)]
        pending = [cell for cell in pending if cell not in done]
        failed: dict[str, str] = {}
        total = len(done) + len(pending)
        with console.progress(total, initial=len(done), unit="cell", what="study") as bar:
            while pending:
                in_use = []
                for row, seed in pending:
                    try:
                        self._fill(row, seed)
                        bar.update(1)
                    except lock.InUse:
                        in_use.append((row, seed))
                    except NonFiniteLoss as error:
                        failed[f"{row.name}, seed {seed}"] = str(error)
                if in_use and len(in_use) == len(pending):
                    time.sleep(WAIT)
                pending = in_use
        if failed:
            raise UserError("; ".join(f"{cell}: {why}" for cell, why in failed.items()))

    def rows(self) -> dict[str, list[dict[str, float]]]:
        """Measures and cost by method, in the order of the seeds; all cells must be there."""
        return {
            name: [
                {**self._row(row, seed)["measures"], **self._trained(row.run, seed)}
                for seed in self._seeds
            ]
            for name, row in self._rows.items()
        }

    def _fill(self, row: Row, seed: int) -> None:
        for needed in filter(None, (row.run, row.guide)):
            self._train(self._rows[needed], seed)
        self._measure(row, seed)

    @contextmanager
    def _held(self, row: Row, seed: int) -> Iterator[Path]:
        """The folder of a cell, while no other process works on it."""
        folder = self.folder(row.name, seed)
        with lock.held(folder, LOCK), disk_errors.reported(folder):
            if not self._is_same(row, seed):
                files.write_json(folder / CELL, row.settings(seed))
            yield folder

    def _is_same(self, row: Row, seed: int) -> bool:
        """Returns whether a cell was begun with these settings; False if it was not begun.

        Raises:
          UserError: it was with others.
        """
        file = self.folder(row.name, seed) / CELL
        if not file.exists():
            return False
        different = changes(files.read_json(file), row.settings(seed))
        if different:
            raise UserError(
                f"{file.parent}: holds {row.name} under seed {seed} with other settings "
                f"({'; '.join(different)}); give the method another name, use its settings, or "
                "remove that folder"
            )
        return True

    def _train(self, row: Row, seed: int) -> None:
        if (self.folder(row.name, seed) / TRAINED).exists() and self._is_same(row, seed):
            return
        start = None
        if row.init_from:
            self._train(self._rows[row.init_from], seed)
            start = str(self.folder(row.init_from, seed).absolute())
        with self._held(row, seed) as folder:
            if (folder / TRAINED).exists():
                return
            console.say(f"training {row.name} under seed {seed}")
            exp = row.of_seed(seed)
            outcome = trainer.run(exp, folder, start, self._programs(row, seed))
            if outcome.stopped_by:
                raise Stopped(outcome.stopped_by)
            files.write_json(folder / TRAINED, cost(exp, folder))

    def _programs(self, row: Row, seed: int) -> Programs:
        """The training programs of a method, compiled once for all seeds."""
        if self._compiled is None or self._compiled[0] != row.name:
            self._compiled = (row.name, SeededPrograms(row.exp))
        return self._compiled[1].of_seed(seed)

    def _measure(self, row: Row, seed: int) -> None:
        with self._held(row, seed) as folder:
            if self._is_done(row, seed):
                return
            params = self._weights(self._rows[row.run], seed, row.exp.config.sample.weights)
            guide = None
            if row.guide and row.exp.config.sample.autoguidance.scale != 1:
                settings, other = row.exp.config.sample.guide, self._rows[row.guide]
                guide = other, self._weights(other, seed, settings.weights, settings.step)
            found = self._bench.measure(row, seed, params, guide, folder)
            files.write_json(folder / ROW, {"measures": found})
            self._bench.forget(folder)

    def _weights(self, row: Row, seed: int, which: str, step: int | None = None) -> Params:
        folder = self.folder(row.name, seed)
        return weights(row.of_seed(seed), folder, step or row.exp.total_steps, which)

    def _is_done(self, row: Row, seed: int) -> bool:
        """Returns whether a cell holds all measures that are asked for."""
        file = self.folder(row.name, seed) / ROW
        if not file.exists():
            return False
        try:
            return set(self._bench.names) <= set(self._row(row, seed)["measures"])
        except (UserError, KeyError, TypeError):
            console.say(f"{file}: is damaged; it is made again")
            return False

    def _row(self, row: Row, seed: int) -> dict[str, Any]:
        return files.read_json(self.folder(row.name, seed) / ROW)

    def _trained(self, run: str, seed: int) -> dict[str, float]:
        return files.read_json(self.folder(run, seed) / TRAINED)
