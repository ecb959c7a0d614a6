"""--mode=prepare: from images to a data set of latents, or from one layout of latents to another.

The examples are cut into parts. Every part is read, encoded and written, and then noted in
`parts/`: a run that was killed skips the parts that are noted. What is encoded together depends on
the part alone and what is random on the example alone, so the files are the same bytes however
often a run was broken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ig_jax import prng, pytree
from ig_jax.checkpoint import compatibility, versions
from ig_jax.codecs.autoencoders import INPUT_RANGE, Autoencoder
from ig_jax.data import crop, provenance
from ig_jax.data.latent_writers import LAYOUTS, FinishedDataset, LatentPart, Layout
from ig_jax.data.provenance import Record
from ig_jax.data.read_ahead import Encode, Example, Unreadable, as_they_are, read_batches
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors, files
from ig_jax.monitoring import console
from ig_jax.parallel import lock, resumable
from ig_jax.parallel.mesh import over_batch, prefetch, replicated, to_global, to_host
from ig_jax.parallel.processes import barrier
from ig_jax.types import Encoded, Params

_SETTINGS, NOTES = "prepare.json", "parts"
LISTED = 10  # unreadable examples that are printed; the record lists all


class Encoder:
    """Batches of images -> float32 [n, h, w, c] as the data set will hold them."""

    def __init__(self, exp: Experiment):
        self._mesh, self._size = exp.local_mesh, exp.config.prepare.batch_size
        whole, rows = replicated(self._mesh), over_batch(self._mesh)
        self._weights = jax.device_put(exp.encoder_weights, whole)

        def encode(batch: dict[str, jax.Array], weights: Params) -> jax.Array:
            keys = prng.keys(exp.config.seed, "prepare", batch["index"])
            return exp.config.data.codec.to_store(batch["image"], weights, keys)

        self._program = jax.jit(encode, in_shardings=(rows, whole), out_shardings=rows)

    def _start(self, examples: list[Example]) -> jax.Array:
        """Sets the devices to work."""
        # Padded, so that one program does them all.
        filled = examples + examples[-1:] * (self._size - len(examples))
        batch = {"image": np.stack([x.row for x in filled])}
        batch["index"] = np.array([x.index for x in filled], np.int32)
        return self._program(to_global(batch, self._mesh, self._size), self._weights)

    def __call__(self, batches: Iterator[list[Example]]) -> Iterator[np.ndarray]:
        """One batch behind, so that the devices need not wait for the next."""
        started = ((self._start(examples), len(examples)) for examples in batches)
        for stored, count in prefetch(started):
            yield to_host(stored)[:count]


class _Preparation(resumable.Parts):
    """One data set being written to one folder; the file of a part is a note on it."""

    def __init__(self, exp: Experiment, folder: Path):
        c = exp.config
        self.exp, self.folder, self.settings = exp, folder, c.prepare
        self.source, self.codec = c.data.source, c.data.codec
        super().__init__(folder / NOTES, len(self.source), c.prepare.examples_per_file)
        _check(exp)
        # Before anything is written: the autoencoder may be missing.
        self.encode: Encode = as_they_are if isinstance(self.source, Encoded) else Encoder(exp)

    @cached_property
    def layout(self) -> Layout:
        *sides, channels = self.codec.latent_shape(self.source.stored_shape)
        return LAYOUTS[self.settings.layout](
            folder=self.folder,
            codec=self.codec.name,
            parts=len(self.ranges),
            num_classes=self.exp.num_classes,
            shape=(*sides, 2 * channels),
        )

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """Everything that decides what is written."""
        weights = self.codec.weights
        how = dataclasses.asdict(self.settings)
        # Whoever is stopped by a bad example may go on without it: all parts before had none.
        del how["bad_examples"]
        data = compatibility.as_json(self.exp.config.raw["data"])
        data["source"].pop("fewer_classes", None)  # of what is refused, not of what is read
        return {
            "seed": self.exp.config.seed,
            "data": data,
            "prepare": how,
            "autoencoder": files.sha256(Path(weights)) if weights else "",
        }

    def begin(self) -> None:
        """Begins the empty folder, or sees that what is in it was begun in the same way."""
        file = self.folder / _SETTINGS
        begun = None
        with suppress(UserError):  # it is absent or damaged
            begun = files.read_json(file)
        if not isinstance(begun, dict):
            # What is hidden may be what a kill left of this very file.
            if any(f.name[0] != "." and f.name != _SETTINGS for f in self.folder.iterdir()):
                what = f"{_SETTINGS} is damaged" if file.exists() else "holds other files"
                raise UserError(f"--workdir={self.folder}: {what}; name an empty folder")
            files.write_json(file, self.made_of)
        elif different := pytree.differences(begun, self.made_of):
            raise UserError(
                f"--workdir={self.folder}: was begun with other settings "
                f"({'; '.join(different)}): use them, or another folder"
            )

    def file(self, part: int) -> Path:
        return self.parts_folder / f"{part:05d}.json"

    def make(self, part: int, readers: ThreadPoolExecutor, bar: Any) -> None:
        """Reads, encodes, writes and notes one part."""
        good: list[Example] = []
        skipped: list[str] = []

        def readable() -> Iterator[list[Example]]:
            size = self.settings.batch_size
            for batch in read_batches(self.source, self.ranges[part], size, readers):
                reasons = [x.reason for x in batch if isinstance(x, Unreadable)]
                if reasons and self.settings.bad_examples == "stop":
                    raise UserError(f"{reasons[0]}, or pass --config.prepare.bad_examples=skip")
                skipped.extend(reasons)
                examples = [x for x in batch if isinstance(x, Example)]
                good.extend(x._replace(row=None) for x in examples)
                bar.update(len(batch))
                if examples:
                    yield examples

        stored = list(self.encode(readable()))
        if not good:
            raise UserError(f"not one of {len(skipped)} examples is readable; {skipped[0]}")
        latents = LatentPart(
            part,
            np.array([x.index for x in good]),
            [x.name for x in good],
            np.array([x.label for x in good]),
            np.concatenate(stored),
        )
        try:
            self.layout.write(latents)
        except RuntimeError as error:  # from array_record
            raise UserError(
                f"{self.folder}: cannot be written to ({error}); make room, {disk_errors.AGAIN}"
            ) from error
        self._write_note(latents, skipped)

    def _write_note(self, part: LatentPart, skipped: list[str]) -> None:
        first, second = self.codec.sums(part.stored)
        note = {
            "indices": part.indices.tolist(),
            "labels": part.labels.tolist(),
            "skipped": skipped,
            "values": int(np.prod(part.stored.shape[:3])),  # of each channel
            "first": first.tolist(),
            "second": second.tolist(),
        }
        files.write_json(self.file(part.number), note)

    def read(self, part: int) -> dict[str, Any] | None:
        note = files.read_json(self.file(part))
        return note if _is_note(note, self.codec.channels) else None

    def finished(self) -> Record | None:
        """The record of the whole data set; None where it is to be made, perhaps again.

        Raises:
          UserError: it is damaged, and nothing is left to make it of.
        """
        try:
            return provenance.read(self.layout.record_folder)
        except UserError:
            if not self.parts_folder.exists():
                raise
            return None

    def merge(self, found: Iterator[dict[str, Any]]) -> None:
        """Writes what describes the whole."""
        notes = list(found)
        whole = _whole(notes)
        self.layout.finish(whole)
        made = self._record(whole, [reason for note in notes for reason in note["skipped"]])
        files.write_text(
            self.layout.record_folder / provenance.PROVENANCE_FILE, provenance.dumps(made)
        )

    def _record(self, whole: FinishedDataset, skipped: list[str]) -> Record:
        known = self.source.record() if isinstance(self.source, Encoded) else None
        if known is None:
            images = not isinstance(self.source, Encoded)
            known = Record(
                codec=self.codec.name,
                autoencoder=self.made_of["autoencoder"] if images else "",
                image_size=self.source.stored_shape[0] if images else 0,
                crop=crop.CROP_NAME if images else "",
                input_range=INPUT_RANGE if images else (),
                examples=0,
                skipped=(),
                mean=(),
                std=(),
                source={},
                versions={},
            )
        return dataclasses.replace(
            known,
            examples=sum(map(len, whole.labels)),
            skipped=(*known.skipped, *skipped),
            mean=tuple(whole.mean.tolist()),
            std=tuple(whole.std.tolist()),
            source=self.made_of["data"]["source"],
            versions=versions.versions(),
        )


def _is_note(found: Any, channels: int) -> bool:
    """Returns whether this is what `_Preparation._write_note` writes."""
    match found:
        case {
            "indices": [_, *_] as indices,
            "labels": [*labels],
            "skipped": [*skipped],
            "values": int(values),
            "first": [*first],
            "second": [*second],
        }:
            return (
                values > 0
                and len(indices) == len(labels)
                and len(first) == len(second) == channels
                and all(type(number) is int for number in (*indices, *labels))
                and all(type(number) is float for number in (*first, *second))
                and all(isinstance(reason, str) for reason in skipped)
            )
    return False


def _whole(notes: list[dict[str, Any]]) -> FinishedDataset:
    """Mean and (n - 1) standard deviation of every channel from sums over the parts."""
    count = sum(note["values"] for note in notes)
    first, second = (np.sum([note[n] for note in notes], axis=0) for n in ("first", "second"))
    mean = first / count
    std = np.sqrt((second - count * mean**2) / (count - 1))
    return FinishedDataset([n["indices"] for n in notes], [n["labels"] for n in notes], mean, std)


def _check(exp: Experiment) -> None:
    """Raises UserError where this config makes no latents, or none for this layout."""
    c, name = exp.config, exp.config.raw["data"]["codec"]["name"]
    if not isinstance(c.data.codec, Autoencoder):
        raise UserError(f"data.codec.name = {name!r}: makes no latents; use sd_vae or va_vae")
    layout = c.prepare.layout
    if name not in LAYOUTS[layout].codecs:
        raise UserError(
            f"prepare.layout = {layout!r}: holds latents of {', '.join(LAYOUTS[layout].codecs)}, "
            f"not of {name!r}; array_record holds both"
        )
    if c.prepare.batch_size % exp.local_mesh.size:
        raise UserError(
            f"prepare.batch_size = {c.prepare.batch_size}: must divide over the "
            f"{exp.local_mesh.size} devices of a process"
        )


def run(exp: Experiment, folder: Path) -> Record:
    """Writes the latents of the config's source to `folder`; goes on where a run before stopped.

    The folder is made, or is empty but for what such a run wrote.

    Raises:
      UserError: the folder holds something else, or another program works there; an example or the
        autoencoder cannot be read; the layout does not fit; the disk is full or gone.
    """
    with lock.held(folder), disk_errors.reported(folder):
        made, written = _prepare(exp, folder)
    for reason in made.skipped[:LISTED]:
        console.say(f"left out: {reason}")
    console.say(
        f"{made.examples:,} examples are in {written} ({exp.config.prepare.layout}, "
        f"{made.codec}), {len(made.skipped)} left out; "
        f"{provenance.PROVENANCE_FILE} tells how they were made"
    )
    return made


def _prepare(exp: Experiment, folder: Path) -> tuple[Record, Path]:
    """The record of what is in the folder when it is done, and where that lies."""
    preparation = _Preparation(exp, folder)
    if jax.process_index() == 0:
        preparation.begin()
    barrier("begun")
    written = preparation.layout.record_folder
    made = preparation.finished()
    if made is not None:
        barrier("done already")
        if jax.process_index() == 0:
            preparation.remove()  # what a kill at the very end left
        console.say(f"{folder} is prepared already")
        return made, written
    console.say_data(preparation.source)
    preparation.complete("preparing")
    return provenance.read(written), written
