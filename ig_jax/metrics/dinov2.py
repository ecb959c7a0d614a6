"""DINOv2's features, as FD_DINOv2 is published on (arXiv 2306.04675; EDM2, arXiv 2312.02696).

Images are brought to 224 x 224 by cubic interpolation (a = -1/2, widened where it shrinks), not
rounded to 8 bits in between, and normalised by ImageNet's mean and spread, as EDM2's
`calculate_metrics.py` does it by default. FD_DINOv2 is published on ViT-L/14; ViT-S/14 and ViT-B/14
give other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ig_jax import pytree
from ig_jax.bounds import unset
from ig_jax.io.paths import Location
from ig_jax.metrics import dinov2_network, published_weights
from ig_jax.metrics.dinov2_network import PATCH, TRAINED_SIDE
from ig_jax.metrics.feature_space import (
    Features,
    ImageBatch,
    TrainingImages,
    require_grey_or_colour,
)
from ig_jax.types import Params

PUBLISHED = "dinov2_vitl14_pretrain.pth"
SIDE = 224
_MEAN, _SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WIDTHS = (384, 768, 1024)  # of ViT-S, B and L
# Stands for patches that training hides; features do not depend on it.
_MASK = "mask_token"


@dataclass(frozen=True)
class Dinov2:
    """The feature space of FD_DINOv2: `pool` is the class token, [b, 1024] of ViT-L/14."""

    # the published .pth, or a .safetensors with the same names
    weights: Location | None = unset("")

    frechet: ClassVar[str] = "fd_dinov2"
    gives: ClassVar[tuple[str, ...]] = ("pool",)
    reads_labels: ClassVar[bool] = False

    def load(self, images: Callable[[], TrainingImages]) -> Params:
        """The weights of `dinov2_network.class_token`; `images` are not asked for.

        Raises:
          UserError: there is no such file, or it holds something else.
        """
        return published_weights.read(
            self.weights,
            from_published,
            measure="FD_DINOv2",
            file=PUBLISHED,
            repository="facebookresearch/dinov2",
            place="with github.com/facebookresearch/dinov2",
        )

    def __call__(self, weights: Params, images: ImageBatch) -> Features:
        """Raises ValueError unless images have 3 channels, or 1: grey is shown to all three."""
        require_grey_or_colour(images)
        x = prepare(images)
        return Features(dinov2_network.class_token(weights, x), logits=None, spatial=None)


def prepare(images: ImageBatch) -> Float[Array, "b 224 224 3"]:
    """Images of any sides, resized and normalised."""
    shape = (len(images), SIDE, SIDE, images.shape[-1])
    resized = jax.image.resize(images.astype(jnp.float32), shape, "cubic", antialias=True)
    mean, spread = (np.array(rgb, np.float32)[None, None, None] for rgb in (_MEAN, _SPREAD))
    return (resized / 255 - mean) / spread


def from_published(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The weights for `dinov2_network.class_token`, float32 numpy arrays, from a state dict.

    Blocks are stacked, and the table of positions is interpolated for images of 224 x 224.

    Raises:
      ValueError: names are missing, left over, or of another shape; names the first of each.
    """
    state = {name: array for name, array in state.items() if name != _MASK}
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    width = np.size(state.get("cls_token", ()))
    width = width if width in _WIDTHS else _WIDTHS[-1]
    published_weights.require(
        state,
        dict(_shapes(width, max(depth, 1))),
        "of DINOv2's ViT-S/14, B/14 or L/14 without registers",
    )
    state = {name: np.asarray(array, np.float32) for name, array in state.items()}
    blocks = [_block(state, f"blocks.{i}.") for i in range(depth)]
    class_position, table = np.split(state["pos_embed"][0], [1])
    table = dinov2_network.interpolate_positions(table, SIDE // PATCH)
    patch = state["patch_embed.proj.weight"].reshape(width, -1)
    return {
        "cls_token": state["cls_token"][0],
        "positions": np.concatenate([class_position, table]),
        "patch_embed": {"kernel": patch.T, "bias": state["patch_embed.proj.bias"]},
        "blocks": pytree.unflatten(
            {name: np.stack([block[name] for block in blocks]) for name in blocks[0]}
        ),
        "norm": {"scale": state["norm.weight"], "bias": state["norm.bias"]},
    }


_LINEAR = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
_NORMS, _SCALES = ("norm1", "norm2"), ("ls1", "ls2")


def _shapes(width: int, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published name and shape of every array that a file must hold."""
    yield "cls_token", (1, 1, width)
    yield "pos_embed", (1, 1 + TRAINED_SIDE**2, width)
    yield "patch_embed.proj.weight", (width, 3, PATCH, PATCH)
    yield "patch_embed.proj.bias", (width,)
    for i in range(depth):
        for layer, (outputs, inputs) in _LINEAR.items():
            yield f"blocks.{i}.{layer}.weight", (outputs * width, inputs * width)
            yield f"blocks.{i}.{layer}.bias", (outputs * width,)
        for norm in _NORMS:
            yield from ((f"blocks.{i}.{norm}.{part}", (width,)) for part in ("weight", "bias"))
        yield from ((f"blocks.{i}.{scale}.gamma", (width,)) for scale in _SCALES)
    yield from ((f"norm.{part}", (width,)) for part in ("weight", "bias"))


def _block(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """One block's arrays by dotted name."""
    block = {}
    for layer in _LINEAR:
        block[f"{layer}.kernel"] = state[f"{prefix}{layer}.weight"].T
        block[f"{layer}.bias"] = state[f"{prefix}{layer}.bias"]
    for norm in _NORMS:
        block[f"{norm}.scale"] = state[f"{prefix}{norm}.weight"]
        block[f"{norm}.bias"] = state[f"{prefix}{norm}.bias"]
    return block | {scale: state[f"{prefix}{scale}.gamma"] for scale in _SCALES}
