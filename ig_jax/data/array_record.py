"""Latents as a data set in the layout of TensorFlow Datasets (`data/tfds_files.py`).

An example has `label`, often `file_name`, and what an autoencoder made of the picture, channels
first as in the published layouts: `moments` [8, h, w], mean and standard deviation as in
`data/npy_folder.py`; or `latents` and `latents_flip` [c, h, w], as in `data/safetensors_shards.py`.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from ig_jax.data import tfds_files
from ig_jax.data.record import Recorded
from ig_jax.data.tfds_split import Example, OfSplit, Split
from ig_jax.errors import BadExample, UserError
from ig_jax.paths import Location

ARRAYS = {"sd_vae": ("moments",), "va_vae": ("latents", "latents_flip")}  # codec -> features
MOMENTS = 8  # channels: mean, standard deviation


@dataclass(frozen=True)
class ArrayRecord(OfSplit, Recorded):
    """float32 [h, w, 8], mean and standard deviation; or [h, w, 2c], a latent and then its twin.

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

    def _check_features(self, features: Mapping[str, Any]) -> None:
        file, kind = f"{self.path}/{tfds_files.FEATURES}", _kind(features)
        if not kind or "label" not in features:
            raise UserError(
                f"{file}: names {', '.join(sorted(features))}; latents need label, and moments or "
                "both latents and latents_flip"
            )
        channels = MOMENTS if kind == "sd_vae" else "channels"
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
        opened, names = self._opened, self._arrays
        stored = np.empty((len(indices), *self.stored_shape), self.stored_dtype)
        label = np.empty(len(indices), np.int32)
        examples = zip(indices.tolist(), opened.read(indices), strict=True)
        for row, (index, example) in enumerate(examples):
            label[row] = opened.label(example, index, self.num_classes)
            arrays = [_array(opened, example, index, name) for name in names]
            np.concatenate([a.transpose(1, 2, 0) for a in arrays], axis=-1, out=stored[row])
            if not np.isfinite(stored[row]).all():
                raise BadExample(f"{opened.place(index)} holds NaN or infinity; encode it again")
        return {"stored": stored, "label": label}


def _array(opened: Split, example: Example, index: int, name: str) -> Float32[np.ndarray, "c h w"]:
    feature, declared = example[name], opened.features[name]
    # Which of the two is in use depends on the encoding that the feature was declared with.
    values = feature.bytes_list.value or [np.asarray(feature.float_list.value, np.float32)]
    with contextlib.suppress(ValueError, TypeError, zlib.error):
        array = declared.decode_example_np(values[0])
        if (array.dtype, array.shape) == (np.float32, declared.shape):
            return array
    raise BadExample(
        f"{opened.place(index)} holds no {name} of float32 {declared.shape}; write it again"
    )


def _kind(features: Mapping[str, Any]) -> str:
    """The codec that reads what these features hold; '' where they are no latents."""
    return next((c for c, names in ARRAYS.items() if all(n in features for n in names)), "")


def _is_latent(feature: Any, kind: str) -> bool:
    from tensorflow_datasets.core.features import Tensor

    return (
        isinstance(feature, Tensor)
        and feature.np_dtype == np.float32
        and len(feature.shape) == 3
        and None not in feature.shape
        and (kind != "sd_vae" or feature.shape[0] == MOMENTS)
    )
