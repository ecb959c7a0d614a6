"""A small classifier of tiny images, whose hidden layer serves as the feature space.

Inception features mean nothing on 8 x 8 digits. A small perceptron fitted on the training images
in about a second takes its place. Numbers compare only within one feature space: same images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from ig_jax.errors import UserError, shown
from ig_jax.metrics.feature_space import Features
from ig_jax.types import Params

# One layer, so that features still tell fine strokes: behind a second layer, digits of one class
# huddle so close that blurred samples pass as real (precision 78 % where this layer reads 67 %).
HIDDEN_SIZES = (128,)
_NAME = "name = 'classifier'"  # what chose it
SEED = 0  # of the initial weights and the order of the batches


@dataclass(frozen=True)
class Classifier:
    """A perceptron of one hidden layer. The same images give the same weights."""

    frechet: ClassVar[str] = "fd"
    gives: ClassVar[tuple[str, ...]] = ("pool", "logits")
    reads_labels: ClassVar[bool] = True

    def load(self, images: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Params:
        """{'hidden', 'classes'}: {'kernel', 'bias'}, float32, fitted on the training images.

        Raises:
          UserError: the images are not uint8, or labels are not 0, 1 (and more) without a gap.
        """
        # Imported here: it takes about a second, which training and sampling need not pay.
        from sklearn.neural_network import MLPClassifier

        pixels, labels = images()
        if pixels.dtype != np.uint8:
            raise UserError(f"{_NAME}: is fitted on uint8 images, but these are {pixels.dtype}")
        classes = np.unique(labels)
        if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
            raise UserError(
                f"{_NAME}: is fitted on the classes 0, 1, ... without a gap, two at least, but "
                f"the images have {shown(classes.tolist())}; use inception"
            )
        # With this tolerance the fit stops by itself, well before the limit of 200 epochs.
        network = MLPClassifier(HIDDEN_SIZES, tol=1e-3, random_state=SEED)
        network.fit(pixels.reshape(len(pixels), -1) / 127.5 - 1, labels)
        layers = [
            {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
            for kernel, bias in zip(network.coefs_, network.intercepts_, strict=True)
        ]
        if len(classes) == 2:  # scikit-learn has a single logit, of class 1 against class 0
            one = layers[-1]
            layers[-1] = {name: np.concatenate([0 * x, x], axis=-1) for name, x in one.items()}
        return dict(zip(("hidden", "classes"), layers, strict=True))

    def __call__(self, weights: Params, images: UInt8[Array, "b h w c"]) -> Features:
        """The hidden layer after its ReLU, and a logit for each class.

        Raises:
          ValueError: the images have another size than those it was fitted on.
        """
        inputs = len(weights["hidden"]["kernel"])
        if images[0].size != inputs:
            raise ValueError(
                f"images are {list(images.shape[1:])}: must have {inputs} values, as those "
                "that the classifier was fitted on"
            )
        pixels = images.reshape(len(images), -1).astype(jnp.float32) / 127.5 - 1
        hidden = jax.nn.relu(_linear(weights["hidden"], pixels))
        return Features(pool=hidden, logits=_linear(weights["classes"], hidden), spatial=None)


def _linear(layer: Params, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
    return jnp.dot(x, layer["kernel"], precision=lax.Precision.HIGHEST) + layer["bias"][None]
