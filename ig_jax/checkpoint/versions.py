"""Versions of what could change numbers."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import flax
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp


@cache
def versions() -> dict[str, str]:
    """Of what could change numbers; of this code the commit, where it is a checkout."""
    modules = {"jax": jax, "flax": flax, "optax": optax, "orbax": ocp, "numpy": np}
    numbers = {name: module.__version__ for name, module in modules.items()}
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        with suppress(OSError):  # without git
            described = subprocess.run(command, capture_output=True, text=True, check=False)
            numbers["ig_jax"] = described.stdout.strip()
    return numbers | {"python": platform.python_version()}
