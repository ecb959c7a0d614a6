"""Internal Guidance and its relatives in JAX: train, sample, evaluate diffusion transformers.

  pipe = ig_jax.load("runs/digits")
  images = pipe.sample(labels=[3, 7], ig=2.0)

docs/api.md shows the rest.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "Pipeline",
    "UserError",
    "load",
    "probe",
    "register_feature_space",
    "register_sampler",
    "register_source",
    "register_term",
    "token_pca",
]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use: who imports one module pays for that alone."""
    if name in __all__:
        return getattr(importlib.import_module("ig_jax.api"), name)
    raise AttributeError(f"module 'ig_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
