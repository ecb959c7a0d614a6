"""Images as a data set in the layout of TensorFlow Datasets (`tfds_files.py`): imagenet2012.

An example has `image`, the bytes of an encoded image, `label`, and often `file_name`. Examples
are in the order of the records, which TFDS has shuffled; to join them with latents of the same
images go by `file_name`. TFDS has encoded 23 images of ImageNet again, so these are not to the
bit what Pillow makes of the original files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ig_jax.bounds import at_most
from ig_jax.data import crop
from ig_jax.data.crop import Cropped
from ig_jax.data.tfds import format as tfds_format
from ig_jax.data.tfds.info import Feature
from ig_jax.data.tfds.reader import OfSplit, TfdsExample
from ig_jax.errors import UserError
from ig_jax.io.paths import Location

_NONE = Feature("nothing", (), "", "none")


@dataclass(frozen=True)
class TfdsImages(OfSplit, Cropped):
    """uint8 [size, size, 3]: images cropped by `crop.center_crop`, with their classes.

    `path` is the folder that holds dataset_info.json, such as imagenet2012/5.1.0. Nothing is read
    before the first use, which opens all shards.

    Raises, on first use or from `batch`:
      UserError: something is missing, cut off, of other features, or labelled outside of
        0..num_classes - 1; names the file.
      BadExample: an image cannot be decoded, or its record is corrupt; names it.
    """

    path: Location
    split: str  # as in dataset_info.json, or a part such as train[:10%]
    size: int = at_most(crop.LARGEST_SIDE)  # side of the cropped images
    num_classes: int

    def __post_init__(self):
        OfSplit.__post_init__(self)
        Cropped.__post_init__(self)

    def _check_features(self, features: Mapping[str, Feature]) -> None:
        image = features.get("image", _NONE)
        # Images of other dtypes are packed into PNG files that are no images.
        right = image.kind == "Image" and image.dtype == "uint8"
        if not right or (self.num_classes > 1 and "label" not in features):
            found = ", ".join(f"{name} {features[name]}" for name in sorted(features))
            raise UserError(
                f"{self.path}/{tfds_format.FEATURES_FILE}: images need image of uint8 and label "
                f"(but with num_classes = 1), but it names {found}; name another data set"
            )

    def unlabelled(self) -> TfdsImages:
        """The same images, all of class 0; their labels are not looked at."""
        return _Unlabelled(self.path, self.split, self.size, 1)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        examples, numbers = self._opened.read(indices), indices.tolist()
        label = [self._label(e, index) for e, index in zip(examples, numbers, strict=True)]
        stored = self._stacked(self._image, examples, numbers)
        return {"stored": stored, "label": np.asarray(label, np.int32)}

    def _label(self, example: TfdsExample, index: int) -> int:
        return self._opened.label(example, index, self.num_classes)

    def _image(self, example: TfdsExample, index: int) -> np.ndarray:
        content = b"".join(example["image"].bytes_list.value)  # one, or none at all
        name = f"{self._opened.place(index)} ({self._opened.file_name(example, index)})"
        return crop.decode(content, self.size, name)


class _Unlabelled(TfdsImages):
    def _label(self, example: TfdsExample, index: int) -> int:
        return 0
