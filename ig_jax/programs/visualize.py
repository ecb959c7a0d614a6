"""--mode=visualize: what a network sees in images, as colours of its tokens' principal components.

Images are noised to several times, each with one noise for all times; at each time one pass of the
network gives the tokens after all blocks that are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ig_jax.codecs.autoencoders import Autoencoder
from ig_jax.codecs.identity import Identity
from ig_jax.config.schema import Visualize, class_numbers
from ig_jax.data import crop
from ig_jax.data.file_tree import Folder
from ig_jax.errors import UserError, shown
from ig_jax.evaluation.encoders import holds_images
from ig_jax.experiment import Experiment
from ig_jax.io import disk_errors, files, npz
from ig_jax.io import images as image_files
from ig_jax.monitoring import console
from ig_jax.parallel import lock
from ig_jax.pipeline import Pipeline
from ig_jax.plots import image_grid
from ig_jax.plots.token_pca import TokenPca, token_pca
from ig_jax.programs import run_record

_GRID, _ARRAYS, _SETTINGS = "grid.png", "pca.npz", "settings.json"
MOST_BLOCKS = 7  # where none are named; the published tool draws as many
NamedImages = tuple[list[str], np.ndarray]  # uint8 [n, side, side, c]


def run(exp: Experiment, workdir: Path) -> Path:
    """Draws the tokens of the newest checkpoint of `workdir`; returns the folder of the results.

    Raises:
      UserError: there is no checkpoint, or no image, or one that cannot be read; the run's codec
        encodes none; the tokens are not finite, or no square grid of more than one; the disk is
        full or gone.
    """
    v = exp.config.visualize
    names, images = _images(exp)
    labels = _labels(exp, len(images))
    blocks = v.blocks or _spread(exp.config.model.depth)
    with disk_errors.reported(workdir):
        step, params = run_record.load_weights(exp, workdir)
        record = _record(exp, step, blocks, names, images)
        pipeline = replace(exp.pipeline, params=params)
        tokens = _tokens(pipeline, v, blocks, images, labels)
        pca = token_pca(tokens, norm=v.norm, basis=v.basis)
        name = f"step{step}-{record['weights']}-{v.basis}-seed{v.seed}"
        target = workdir / "visualizations" / f"{name}-{run_record.settings_digest(record)}"
        with lock.held(target), disk_errors.reported(target):
            image_grid.save(target / _GRID, _grid(images, pca, v.times, blocks))
            _write_arrays(target / _ARRAYS, images, pca, v.times, blocks)
            files.write_json(target / _SETTINGS, record)
    console.say(
        f"tokens of step {step} ({len(images)} images, {len(v.times)} times, {len(blocks)} blocks) "
        f"are in {target} ({_GRID}, {_ARRAYS})"
    )
    return target


def _tokens(
    pipeline: Pipeline,
    settings: Visualize,
    blocks: Sequence[int],
    images: np.ndarray,
    labels: Sequence[int] | None,
) -> np.ndarray:
    """float32 [images, times, blocks, n, width]."""
    latents = pipeline.encode(images, seed=settings.seed)
    at_times = []
    with console.progress(len(settings.times), unit="time", what="looking") as bar:
        for t in settings.times:
            found = pipeline.features(latents, t, blocks, labels, seed=settings.seed)
            at_times.append(np.stack([np.asarray(found[block]) for block in blocks], axis=1))
            bar.update(1)
    return np.stack(at_times, axis=1)


def _spread(depth: int) -> tuple[int, ...]:
    """Up to `MOST_BLOCKS` blocks from the first to the last."""
    return tuple(np.linspace(1, depth, min(MOST_BLOCKS, depth)).round().astype(int).tolist())


def _labels(exp: Experiment, n: int) -> list[int] | None:
    """Classes of the images; None for the null class."""
    labels = exp.config.visualize.labels
    if labels is not None:
        return np.resize(class_numbers(labels), n).tolist()
    if not exp.pipeline.has_null_class:
        raise UserError(
            "visualize.labels = None: this network was trained without a null class; name class "
            "numbers, such as 0,1,2"
        )
    return None


# Images.


def _images(exp: Experiment) -> NamedImages:
    """The images that `visualize.images` names, or held-out ones, and names for the record."""
    shape = _shape(exp)
    given = exp.config.visualize.images
    return _of_data(exp) if given is None else _of_files(exp.config.visualize, Path(given), shape)


def _shape(exp: Experiment) -> tuple[int, int, int]:
    """Of an image that the network can see; raises UserError where it sees none."""
    codec, (height, width, channels) = exp.config.data.codec, exp.net.latent_shape
    if isinstance(codec, Autoencoder):
        return height * codec.factor, width * codec.factor, 3
    if isinstance(codec, Identity) and channels in (1, 3):
        return height, width, channels
    name = exp.config.raw["data"]["codec"]["name"]
    raise UserError(
        f"data.codec.name = {name!r}: makes no latents of {height} x {width} x {channels} from "
        "images; --mode=visualize needs a codec that does, such as sd_vae"
    )


def _chosen(total: int, num: int) -> np.ndarray:
    """Indices of up to `num` of `total` images, spread evenly."""
    num = min(num, total)
    return np.arange(num) * total // num


def _of_data(exp: Experiment) -> NamedImages:
    source = exp.config.data.source
    if not holds_images(source):
        raise UserError(
            "visualize.images = None: data.source holds no images; name an image file, or a folder"
        )
    held_out = source.held_out()
    name, source = ("data.source", source) if held_out is None else ("held out", held_out)
    indices = _chosen(len(source), exp.config.visualize.num)
    return [f"{name}, {i}" for i in indices], source.batch(indices)["stored"]


def _of_files(settings: Visualize, place: Path, shape: tuple[int, int, int]) -> NamedImages:
    chosen = [place]
    if place.is_dir():
        names = sorted(name for name in Folder(str(place)).names() if image_files.is_image(name))
        if not names:
            raise UserError(
                f"visualize.images = {shown(str(place))}: holds no image; name another folder"
            )
        chosen = [place / names[i] for i in _chosen(len(names), settings.num)]
    elif not place.exists():
        raise UserError(
            f"visualize.images = {shown(str(place))}: no such file; name an image, or a folder"
        )
    return [str(file) for file in chosen], np.stack(
        [_fitted(file, settings.resize, *shape) for file in chosen]
    )


def _fitted(file: Path, resize: str, height: int, width: int, channels: int) -> np.ndarray:
    """An image file as uint8 [height, width, channels]."""
    if resize == "crop":
        content = files.read_bytes(file, image_files.LARGEST)
        image = Image.fromarray(crop.decode(content, height, str(file)))
    else:
        image = image_files.read(file).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image) if channels == 3 else np.array(image.convert("L"))[..., None]


# Results.


def _record(
    exp: Experiment, step: int, blocks: Sequence[int], names: list[str], images: np.ndarray
) -> dict[str, Any]:
    """All that decides what is drawn."""
    v, raw = exp.config.visualize, exp.config.raw
    pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    return {
        "checkpoint_step": step,
        "weights": exp.config.sample.weights,
        **{name: getattr(v, name) for name in ("resize", "labels", "seed", "norm", "basis")},
        "times": list(v.times),
        "blocks": list(blocks),
        "images": [
            {"name": name, "sha256": seen} for name, seen in zip(names, pixels, strict=True)
        ],
        "codec": raw["data"]["codec"],
        "model": raw["model"],
        "process": raw["process"],
    }


def _grid(
    images: np.ndarray, pca: TokenPca, times: Sequence[float], blocks: Sequence[int]
) -> np.ndarray:
    """A row for each image and time: the image, and its tokens after each block."""
    tokens = np.round(255 * pca.rgb).astype(np.uint8)
    rows = {
        f"image {i}\nt = {t:g}": [image, *tokens[i, j]]
        for i, image in enumerate(images)
        for j, t in enumerate(times)
    }
    return image_grid.table(rows, ["image", *(f"block {block}" for block in blocks)])


def _write_arrays(
    file: Path,
    images: np.ndarray,
    pca: TokenPca,
    times: Sequence[float],
    blocks: Sequence[int],
) -> None:
    axes = {"times": np.float32(times), "blocks": np.int32(blocks), "images": images}
    npz.write(file, axes | vars(pca))
