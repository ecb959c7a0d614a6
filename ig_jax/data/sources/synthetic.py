"""Made-up latents of any shape: to try a configuration, or to measure speed, without data.

Every class has a mean of its own and every example its own noise around it, so a network has
something to learn; nothing is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ig_jax.bounds import at_most

SPREAD = 0.5  # of an example around the mean of its class; the means are standard normal


@dataclass(frozen=True)
class Synthetic:
    """float32 latents [side, side, channels] with labels 0..num_classes - 1."""

    side: int = at_most(2**16)
    channels: int = at_most(2**16)
    num_classes: int
    size: int  # number of examples

    stored_dtype = np.float32

    def __post_init__(self):
        for name in ("side", "channels", "num_classes", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        return self.side, self.side, self.channels

    def __len__(self) -> int:
        return self.size

    def held_out(self) -> None:
        return None  # nothing real to compare with

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        labels = np.asarray(indices % self.num_classes, np.int32)
        latents = [
            _normal(1, label, (self.channels,)) + SPREAD * _normal(0, index, self.stored_shape)
            for index, label in zip(indices.tolist(), labels.tolist(), strict=True)
        ]
        return {"stored": np.stack(latents), "label": labels}


def _normal(stream: int, address: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng((stream, address)).standard_normal(shape, np.float32)
