"""What every test gets: two CPU devices, strict shapes, and the golden vectors."""

import os
from pathlib import Path

import compiled
import cpu_devices

os.environ["XLA_FLAGS"] = cpu_devices.xla_flags(2)
os.environ["JAX_PLATFORMS"] = "cpu"
compiled.quickly()

import jax
import pytest
from places import GOLDEN

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=GOLDEN,
        help="directory of golden vectors to hold the code to (default: tests/golden)",
    )


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("--golden")
