"""Random weights of the FID Inception network, the same wherever they are made, and images.

The golden features of `test_inception.py` were computed from these: no other 95 MB are kept. The
names and shapes are those of the published file (`golden/inception_fid_keys.json`).
"""

import json
import zlib

import numpy as np
import places

KEYS = places.GOLDEN / "inception_fid_keys.json"
SIDES = (64, 256, 512)  # of the images: one to enlarge, two to shrink


def _draw(rng: np.random.Generator, name: str, shape: list[int]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith(("bn.weight", "running_var")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith(".weight"):  # keeps the size of activations from layer to layer
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    return (rng.standard_normal(shape) * 0.1).astype(np.float32)


def state() -> dict[str, np.ndarray]:
    """The state dict with every published name, each array from a seed of its own name."""
    shapes = json.loads(KEYS.read_text())
    return {
        name: _draw(np.random.default_rng(zlib.crc32(name.encode())), name, shape)
        for name, shape in shapes.items()
    }


def picture(side: int) -> np.ndarray:
    """Waves of several lengths and noise, uint8 [1, side, side, 3]."""
    rng = np.random.default_rng(side)
    y, x = np.mgrid[:side, :side] / side
    waves = [
        np.sin(2 * np.pi * (a * y + b * x) + phase)
        for a, b, phase in zip(*rng.uniform(0, 8, (3, 3)), strict=True)
    ]
    levels = 128 + 80 * np.stack(waves, axis=-1) + 20 * rng.standard_normal((side, side, 3))
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)[None]
