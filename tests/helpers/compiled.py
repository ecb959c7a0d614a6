"""Compiling, most of what tests cost: fewer optimisations, and every program once a session.

Settings go through the environment, so that they hold in the processes that tests start as well.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

CACHE = "JAX_COMPILATION_CACHE_DIR"
AS_USERS_RUN = "IG_JAX_TESTS_WITH_XLA_DEFAULTS"
# Fusing operations through MLIR is three quarters of what it costs to compile a small program. The
# older way rounds a product and the sum it goes into once or twice, depending on what is fused:
# always twice on processors without AVX2, so that programs that should agree in every bit do.
# Later versions of XLA have no older way, and end a process that names a flag they do not know.
# `make test-slow` compares golden vectors under XLA's own settings, which users run.
OLDER_FUSION = "--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX"
FLAGS = OLDER_FUSION if version("jaxlib").startswith("0.10.") else ""


def quickly() -> None:
    """Before jax is imported: without the optimisations that programs this small never repay.

    All processes started from here on share one cache of compiled programs, which goes with this
    one, so that nothing of another session is trusted.
    """
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="ig_jax_compiled_")
        atexit.register(_remove, os.environ[CACHE], os.getpid())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if AS_USERS_RUN not in os.environ:
        # Of two equal flags the last one counts: those that were given.
        os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # a fork ends earlier
        shutil.rmtree(folder, ignore_errors=True)
