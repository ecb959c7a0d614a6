"""--mode=reference: statistics of real pictures, which samples are then compared with.

The pictures are cut into parts. What is known of a part (moments in float64, and the features of
some of its pictures) is one file: a run that was killed skips the parts that are there, and the
result does not depend on how often that was, or on how many processes shared the work.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax import judge, logs, sharding
from ig_jax.build import Experiment
from ig_jax.encode import Unreadable, read_batches
from ig_jax.errors import UserError
from ig_jax.look import Look, Rows, joined
from ig_jax.metrics import reference as statistics
from ig_jax.metrics.moments import Moments
from ig_jax.types import Source

PART = 50_000  # pictures; what a kill can cost
TOGETHER = 5_000  # rows of features that are added to the moments at once
CHOSEN = 10_000  # pictures whose features are kept for precision and recall, as many as ADM's
READERS = 16
FILE, PARTS = "reference.npz", ".parts"


def _chosen(total: int) -> np.ndarray:
    """Which pictures precision and recall are taken with, ascending; always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(total)[:CHOSEN])


def _require_pictures(source: Source) -> None:
    if not judge.holds_pictures(source):
        raise UserError(
            "data.source: holds latents; statistics are taken of pictures, such as those of "
            ":image_folder or :tfds_images"
        )


def _features(
    source: Source, look: Look, indices: range, size: int, readers: Any, bar: Any
) -> Iterator[Rows]:
    """Rows of the pictures `indices`, about TOGETHER of them at a time.

    Raises:
      UserError: a picture cannot be read.
    """
    waiting: list[Rows] = []
    for batch in read_batches(source, indices, size, readers):
        for example in batch:
            if isinstance(example, Unreadable):
                raise UserError(f"{example.reason}; statistics are of all pictures or of none")
        waiting.append(look(np.stack([example.row for example in batch])))
        bar.update(len(batch))
        if sum(len(w["pool"]) for w in waiting) >= TOGETHER:
            yield joined(waiting)
            waiting = []
    if waiting:
        yield joined(waiting)


def _write_part(file: Path, parts: Iterator[Rows], kept: np.ndarray) -> None:
    """Moments of a part, and the features of its pictures `kept` (places within the part)."""
    moments: dict[str, Moments] = {}
    rows, start = [], 0
    for found in parts:
        for name in {"pool", "spatial"} & set(found):
            new = Moments.from_features(found[name])
            moments[name] = moments[name].merge(new) if name in moments else new
        stop = start + len(found["pool"])
        rows.append(found["pool"][kept[(start <= kept) & (kept < stop)] - start])
        start = stop
    arrays = {
        f"{name}.{field}": getattr(m, field)
        for name, m in moments.items()
        for field in ("count", "mean", "scatter")
    }
    hidden = file.with_name(f".{file.name}")
    with open(hidden, "wb") as content:
        np.savez(content, rows=np.concatenate(rows), **arrays)
    hidden.replace(file)


def _merged(files: list[Path]) -> tuple[dict[str, Moments], np.ndarray]:
    """Moments of all parts, and the features that were kept, in order."""

    def of(file: Path) -> tuple[dict[str, Moments], np.ndarray]:
        with np.load(file) as part:
            names = {name.split(".")[0] for name in part.files} - {"rows"}
            moments = {
                n: Moments(int(part[f"{n}.count"]), part[f"{n}.mean"], part[f"{n}.scatter"])
                for n in names
            }
            return moments, part["rows"]

    def both(a: tuple, b: tuple) -> tuple[dict[str, Moments], np.ndarray]:
        return {n: m.merge(b[0][n]) for n, m in a[0].items()}, np.concatenate([a[1], b[1]])

    return reduce(both, map(of, files))


def run(exp: Experiment, folder: Path) -> Path:
    """Writes reference.npz, of all pictures of the config's source, to `folder`; returns its path.

    Raises:
      UserError: the source holds no pictures, one of them cannot be read, or the feature space's
        file is missing; the disk is full.
    """
    source, target = exp.config.data.source, folder / FILE
    _require_pictures(source)
    if hasattr(source, "unlabelled"):
        source = source.unlabelled()  # statistics need no classes
    if target.exists():
        logs.say(f"{target} is there already")
        return target
    look, digest = judge.make_look(exp)
    logs.say_data(source)
    total, size = len(source), exp.config.sample.batch_size
    parts = [range(i, min(i + PART, total)) for i in range(0, total, PART)]
    files = [folder / PARTS / f"{digest[:8]}-{i:05d}.npz" for i in range(len(parts))]
    own = sharding.mine(len(parts))
    left = [i for i in own if not files[i].exists()]
    pictures, rest = (sum(len(parts[i]) for i in some) for some in (own, left))
    with (
        logs.room_or_stop(folder),
        ThreadPoolExecutor(READERS) as readers,
        logs.progress(pictures, initial=pictures - rest, unit="image", what="looking") as bar,
    ):
        (folder / PARTS).mkdir(exist_ok=True)
        chosen = _chosen(total)
        for i in left:
            kept = chosen - parts[i].start
            seen = _features(source, look, parts[i], size, readers, bar)
            _write_part(files[i], seen, kept[(0 <= kept) & (kept < len(parts[i]))])
        sharding.meet("seen")
        if jax.process_index() == 0:
            moments, rows = _merged(files)
            gaussians = {name: m.gaussian for name, m in moments.items()}
            statistics.write(
                *(target, gaussians["pool"], gaussians.get("spatial"), rows),
                space=digest,
                count=total,
            )
            shutil.rmtree(folder / PARTS)
    sharding.meet("written")
    logs.say(f"statistics of {total:,} pictures are in {target}; name it in evaluate.reference")
    return target
