"""Random weights with the names of DINOv2's ViT-S/14, of two blocks, the same wherever made.

The golden features of `test_dinov2.py` were computed from these: no 88 MB are kept.
"""

import zlib

import numpy as np

WIDTH, DEPTH, POSITIONS = 384, 2, 37 * 37


def shapes() -> dict[str, tuple[int, ...]]:
    """Published name -> shape."""
    block = {
        "norm1.weight": (WIDTH,),
        "norm1.bias": (WIDTH,),
        "attn.qkv.weight": (3 * WIDTH, WIDTH),
        "attn.qkv.bias": (3 * WIDTH,),
        "attn.proj.weight": (WIDTH, WIDTH),
        "attn.proj.bias": (WIDTH,),
        "ls1.gamma": (WIDTH,),
        "norm2.weight": (WIDTH,),
        "norm2.bias": (WIDTH,),
        "mlp.fc1.weight": (4 * WIDTH, WIDTH),
        "mlp.fc1.bias": (4 * WIDTH,),
        "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        "mlp.fc2.bias": (WIDTH,),
        "ls2.gamma": (WIDTH,),
    }
    return {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + POSITIONS, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
        **{f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in block.items()},
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith(".weight"):  # twice what keeps the size: attention is not flat
        return (2 * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (0.3 * rng.standard_normal(shape)).astype(np.float32)


def state() -> dict[str, np.ndarray]:
    """A state dict, each array from a seed of its own name."""
    return {name: _draw(name, shape) for name, shape in shapes().items()}
