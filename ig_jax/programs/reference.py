"""--mode=reference: statistics of real images, which samples are then compared with.

Those of a second encoder are taken in the same pass, and are a file of their own.

The images are cut into parts. What is known of a part (moments in float64, and the features of
some of its images) is one file: a run that was killed skips the parts that are there, and the
result does not depend on how often that was, or on how many processes shared the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax.data.read_ahead import Unreadable, read_batches
from ig_jax.errors import UserError
from ig_jax.evaluation.encoders import SECOND, Encoders, holds_images, make_encoders
from ig_jax.evaluation.feature_extractor import Rows, concatenate_rows
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors, files, npz
from ig_jax.metrics import reference_statistics as statistics
from ig_jax.metrics.moments import Moments
from ig_jax.monitoring import console
from ig_jax.parallel import lock, resumable
from ig_jax.parallel.processes import from_process_0
from ig_jax.types import Source

PART = 50_000  # images; what a kill can cost
TOGETHER = 5_000  # rows of features that are added to the moments at once
CHOSEN = 10_000  # images whose features are kept for precision and recall, as many as ADM's
_FILE, PARTS = "reference.npz", ".parts"

_WITH_ROWS = {"pool", SECOND}  # of some images features are kept

# Moments, and features of some images, by the name of their rows.
Part = tuple[dict[str, Moments], dict[str, np.ndarray]]


def _require_images(source: Source) -> None:
    if not holds_images(source):
        raise UserError(
            "data.source: holds latents; statistics are taken of images, such as those of "
            ":image_folder or :tfds_images"
        )


def _features(
    source: Source, look: Encoders, indices: range, size: int, readers: Any, bar: Any
) -> Iterator[Rows]:
    """Rows of the images `indices`, about TOGETHER of them at a time.

    Raises:
      UserError: an image cannot be read.
    """
    waiting: list[Rows] = []
    for batch in read_batches(source, indices, size, readers):
        for example in batch:
            if isinstance(example, Unreadable):
                raise UserError(f"{example.reason}; statistics are of all images or of none")
        waiting.append(look(np.stack([example.row for example in batch])))
        bar.update(len(batch))
        if sum(len(w["pool"]) for w in waiting) >= TOGETHER:
            yield concatenate_rows(waiting)
            waiting = []
    if waiting:
        yield concatenate_rows(waiting)


def _write_part(file: Path, parts: Iterator[Rows], kept: np.ndarray) -> None:
    """Moments of a part, and the features of its images `kept` (places within the part)."""
    moments: dict[str, Moments] = {}
    rows: dict[str, list[np.ndarray]] = {}
    start = 0
    for found in parts:
        for name in {"pool", "spatial", SECOND} & set(found):
            new = Moments.from_features(found[name])
            moments[name] = moments[name].merge(new) if name in moments else new
        stop = start + len(found["pool"])
        chosen = kept[(start <= kept) & (kept < stop)] - start
        for name in _WITH_ROWS & set(found):
            rows.setdefault(name, []).append(found[name][chosen])
        start = stop
    arrays = {
        f"{name}.{field}": getattr(m, field)
        for name, m in moments.items()
        for field in ("count", "mean", "scatter")
    }
    arrays |= {f"{name}.rows": np.concatenate(parts) for name, parts in rows.items()}
    with files.replaced(file) as hidden, open(hidden, "wb") as content:
        np.savez(content, **arrays)


def _both(a: Part, b: Part) -> Part:
    moments = {name: m.merge(b[0][name]) for name, m in a[0].items()}
    return moments, {name: np.concatenate([rows, b[1][name]]) for name, rows in a[1].items()}


class _Statistics(resumable.Parts):
    """Statistics of all images of a source, being written to a file for each encoder."""

    def __init__(
        self, targets: Sequence[Path], exp: Experiment, encoders: Encoders, source: Source
    ):
        super().__init__(targets[0].parent / PARTS, len(source), PART)
        self._targets, self._source, self._look = targets, source, encoders
        # By the name of the rows of their features.
        self._encoders = {"pool": encoders.first}
        if encoders.second is not None:
            self._encoders[SECOND] = encoders.second
        self._size = exp.config.sample.batch_size
        # For precision and recall always the same ones.
        self._chosen = np.sort(np.random.default_rng(0).permutation(len(source))[:CHOSEN])
        # Parts of other images, or seen by other weights, have other names.
        seen_by = [encoder.digest for encoder in self._encoders.values()]
        made_of = [*seen_by, exp.config.raw["data"]["source"], len(source), PART, CHOSEN]
        self._name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    def file(self, part: int) -> Path:
        return self.parts_folder / f"{self._name}-{part:05d}.npz"

    def _kept(self, part: int) -> np.ndarray:
        """Places within the part of the images whose features are kept."""
        places = self._chosen - self.ranges[part].start
        return places[(0 <= places) & (places < len(self.ranges[part]))]

    def read(self, part: int) -> Part | None:
        file, count, kept = self.file(part), len(self.ranges[part]), len(self._kept(part))
        arrays = {name: npz.read_array(file, name) for name in npz.names(file)}
        try:
            moments = {
                n: Moments(int(arrays[f"{n}.count"]), arrays[f"{n}.mean"], arrays[f"{n}.scatter"])
                for n in {name.split(".")[0] for name in arrays}
            }
            rows = {n: arrays[f"{n}.rows"] for n in _WITH_ROWS & set(moments)}
            whole = "pool" in moments and all(
                m.count == count and m.scatter.shape == 2 * m.mean.shape for m in moments.values()
            )
            whole &= all(rows[n].shape == (kept, moments[n].mean.size) for n in rows)
        except (KeyError, TypeError):
            return None
        return (moments, rows) if whole else None

    def make(self, part: int, readers: ThreadPoolExecutor, bar: Any) -> None:
        images = self.ranges[part]
        seen = _features(self._source, self._look, images, self._size, readers, bar)
        _write_part(self.file(part), seen, self._kept(part))

    def merge(self, found: Iterator[Part]) -> None:
        moments, rows = reduce(_both, found)
        gaussians = {name: m.gaussian for name, m in moments.items()}
        for (name, encoder), target in zip(self._encoders.items(), self._targets, strict=True):
            statistics.write(
                *(target, gaussians[name], gaussians.get("spatial") if name == "pool" else None),
                rows[name],
                space=encoder.digest,
                count=len(self._source),
            )


def _is_there(target: Path) -> bool:
    """Returns whether the statistics are there; damaged ones are made again."""
    if not target.exists():
        return False
    try:
        statistics.read(target, _FILE)
    except UserError as fault:
        console.say(f"{fault}: it is made again")
        return False
    return True


def _targets(exp: Experiment, folder: Path) -> list[Path]:
    """The files of the encoders' statistics."""
    second = exp.config.evaluate.second_features
    others = [] if second is None else [f"reference-{second.frechet}.npz"]
    return [folder / name for name in (_FILE, *others)]


def run(exp: Experiment, folder: Path) -> Path:
    """Writes reference.npz, of all images of the config's source, to `folder`; returns its path.

    With a second encoder also reference-fd_dinov2.npz, or what its distance is called.

    Raises:
      UserError: the source holds no images, one of them cannot be read, or a feature space's file
        is missing; another program works in the folder; the disk is full or gone.
    """
    source, targets = exp.config.data.source, _targets(exp, folder)
    _require_images(source)
    if hasattr(source, "unlabelled"):
        source = source.unlabelled()  # statistics need no classes
    names = " and ".join(map(str, targets))
    with lock.held(folder), disk_errors.reported(folder):
        if from_process_0(jax.process_index() == 0 and all(map(_is_there, targets))):
            console.say(f"{names}: there already")
            return targets[0]
        made = _Statistics(targets, exp, make_encoders(exp.config, exp.mesh), source)
        console.say_data(source)
        made.complete("looking")
    fields = ("evaluate.reference", "evaluate.second_reference")[: len(targets)]
    console.say(
        f"statistics of {len(source):,} images are in {names}; set {' and '.join(fields)} to them"
    )
    return targets[0]
