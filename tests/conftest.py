"""What every test gets: two CPU devices, strict shapes, and the golden vectors."""

import gc
import os
from pathlib import Path

import compiled
import cpu_devices

os.environ["XLA_FLAGS"] = cpu_devices.xla_flags(2)
os.environ["JAX_PLATFORMS"] = "cpu"
# A core is for a worker: threads of two workers that wait for each other burn both.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
compiled.quickly()

import jax
import pytest
from places import GOLDEN

jax.config.update("jax_numpy_rank_promotion", "raise")

# Begun first, the longest before the others, so that no worker is left alone with one of them.
LONGEST = (
    *("test_pages", "test_sharding", "test_processes", "test_killed", "test_chaos", "test_storage"),
    *("test_terms", "test_cells", "test_study", "test_init_from", "test_self_conditioning"),
    *("test_contrastive", "test_self_conditioned_run", "test_dit_run", "test_golden_sit_runs"),
    *("test_prepare", "test_import", "test_evaluate", "test_train", "test_search", "test_readme"),
    *("test_codecs", "test_reference_mode", "test_benchmarks", "test_checkpoint_faults"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of LONGEST, then as they were."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Leaves what stays to the end, modules and tests, out of every garbage collection.

    Collects seldom, as the program does: tracing makes many objects that stay.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 10)


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
