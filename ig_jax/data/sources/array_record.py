"""Latents as a data set in the layout of TensorFlow Datasets (`data/tfds_files.py`).

An example has `label`, often `file_name`, and what an autoencoder made of the image, channels
first as in the published layouts: `moments` [8, h, w], mean and standard deviation as in
`data/npy_folder.py`; or `latents` and `latents_flip` [c, h, w], as in `data/safetensors_shards.py`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from ig_jax.data.provenance import Recorded
from ig_jax.data.tfds import format as tfds_format
from ig_jax.data.tfds.info import Feature
from ig_jax.data.tfds.reader import OfSplit, Split, TfdsExample
from ig_jax.errors import BadExample, UserError
from ig_jax.io.paths import Location

ARRAYS = {"sd_vae": ("moments",), "va_vae": ("latents", "latents_flip")}  # codec -> features
_ENCODINGS = ("none", "bytes", "zlib")  # of tensors, by TFDS
_MOMENTS = 8  # channels: mean, standard deviation


@dataclass(frozen=True)
class ArrayRecord(OfSplit, Recorded):
    """float32 [h, w, 8], mean and standard deviation; or [h, w, 2c], a latent and its flipped copy.

    `path` is the folder that holds dataset_info.json. Nothing is read before the first use, which
    opens all shards.

    Raises, on first use or from `batch`:
      UserError: something is missing, cut off, of other features, or labelled outside of
        0..num_classes - 1; names the file.
      BadExample: an example is corrupt or not finite; names its shard and record.
    """

    path: Location
    split: str  # as in dataset_info.json, or a part such as train[:10%]
    num_classes: int

    stored_dtype = np.float32

    def __post_init__(self):
        super().__post_init__()
        if self.num_classes < 1:
            raise ValueError(f"num_classes = {self.num_classes}: must be at least 1")

    @property
    def _arrays(self) -> tuple[str, ...]:
        return ARRAYS[self._codec_of_layout]

    @property
    def _codec_of_layout(self) -> str:
        return _kind(self._opened.features)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        channels, height, width = self._opened.features[self._arrays[0]].shape
        return height, width, channels * len(self._arrays)

    def _check_features(self, features: Mapping[str, Feature]) -> None:
        file, kind = f"{self.path}/{tfds_format.FEATURES_FILE}", _kind(features)
        if not kind or (self.num_classes > 1 and "label" not in features):
            raise UserError(
                f"{file}: names {', '.join(sorted(features))}; latents need label (but with "
                "num_classes = 1), and moments or both latents and latents_flip"
            )
        channels = _MOMENTS if kind == "sd_vae" else "channels"
        for name in ARRAYS[kind]:
            if not _is_latent(features[name], kind):
                raise UserError(
                    f"{file}: {name} is {features[name]}, must be Tensor(shape=({channels}, "
                    "height, width), dtype=float32); write the data set again"
                )
        if len({features[name].shape for name in ARRAYS[kind]}) > 1:
            raise UserError(
                f"{file}: latents {features['latents'].shape} and latents_flip "
                f"{features['latents_flip'].shape} must be alike; write the data set again"
            )

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        opened, names, numbers = self._opened, self._arrays, indices.tolist()
        pairs = list(zip(opened.read(indices), numbers, strict=True))
        label = [opened.label(example, index, self.num_classes) for example, index in pairs]
        # First of all examples: their shape is only said in a file until one of them has it.
        arrays = [[_array(opened, example, index, n) for n in names] for example, index in pairs]
        stored = np.empty((len(indices), *self.stored_shape), self.stored_dtype)
        for row, found, index in zip(stored, arrays, numbers, strict=True):
            np.concatenate([a.transpose(1, 2, 0) for a in found], axis=-1, out=row)
            if not np.isfinite(row).all():
                raise BadExample(f"{opened.place(index)} holds NaN or infinity; encode it again")
        return {"stored": stored, "label": np.asarray(label, np.int32)}


def _array(
    opened: Split, example: TfdsExample, index: int, name: str
) -> Float32[np.ndarray, "c h w"]:
    feature, declared = example[name], opened.features[name]
    values = np.asarray(feature.float_list.value, np.float32)
    if declared.encoding != "none":
        values = _decoded(b"".join(feature.bytes_list.value), declared)  # one, or none at all
    if values.size != math.prod(declared.shape):
        raise BadExample(
            f"{opened.place(index)} holds no {name} of float32 {declared.shape}; write it again"
        )
    return values.reshape(declared.shape)


def _decoded(content: bytes, declared: Feature) -> Float32[np.ndarray, "n"]:
    """The values of an encoded tensor; none where they are damaged, or not as many as declared."""
    size = 4 * math.prod(declared.shape)
    if declared.encoding == "zlib":
        try:
            content = zlib.decompressobj().decompress(content, size + 1)
        except zlib.error:
            content = b""
    return np.frombuffer(content if len(content) == size else b"", "<f4")


def _kind(features: Mapping[str, Feature]) -> str:
    """The codec that reads what these features hold; '' where they are no latents."""
    return next((c for c, names in ARRAYS.items() if all(n in features for n in names)), "")


def _is_latent(feature: Feature, kind: str) -> bool:
    return (
        (feature.kind, feature.dtype) == ("Tensor", "float32")
        and feature.encoding in _ENCODINGS
        and len(feature.shape) == 3
        and None not in feature.shape
        and (kind != "sd_vae" or feature.shape[0] == _MOMENTS)
    )
