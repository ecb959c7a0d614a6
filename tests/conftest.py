"""What every test gets: two CPU devices, strict shapes, and the golden vectors."""

import json
import os
from pathlib import Path

# Added to what is there, so that the tests can be run under other settings of the compiler:
# XLA_FLAGS=--xla_cpu_max_isa=AVX2 make test
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parent / "golden"


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


@pytest.fixture(scope="session")
def golden_configs(golden_dir: Path) -> dict:
    """Sizes and settings of every vector file."""
    return json.loads((golden_dir / "configs.json").read_text())


@pytest.fixture(scope="session")
def golden_tolerances(golden_dir: Path) -> dict:
    """How much float32 rounding alone moves each reference output."""
    return json.loads((golden_dir / "tolerances.json").read_text())
