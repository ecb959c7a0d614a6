"""What the benchmarks of speed share: a config made smaller, timed calls, tables and records.

Devices work on while the host goes on, so a call is timed to the moment when its results are there.
Several calls are timed together, as a training loop makes them: none waits for the one before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
from ml_collections import ConfigDict

from ig_jax import experiment
from ig_jax.checkpoint import versions as checkpoint_manager
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.monitoring import console

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
MODEL_FLAGS = {
    **{"depth": int, "hidden_size": int, "num_heads": int},
    **{"remat": str, "unroll": int, "dtype": str},
}


class Seconds(NamedTuple):
    """Of one call, over several windows of calls."""

    median: float
    least: float
    most: float

    @property
    def spread(self) -> str:
        """How far apart the windows are, beside their median."""
        return f"{(self.most - self.least) / self.median:.1%}"


def window(call: Callable[[], Any], calls: int) -> float:
    """Seconds a call, of several one after the other."""
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def of(windows: list[float]) -> Seconds:
    return Seconds(statistics.median(windows), min(windows), max(windows))


def seconds(call: Callable[[], Any], *, calls: int, windows: int) -> Seconds:
    """Of a call that is compiled already; what its first run does besides is left out."""
    jax.block_until_ready(call())
    return of([window(call, calls) for _ in range(windows)])


class Built(NamedTuple):
    """A program for arguments of certain shapes, and how long it took to make."""

    program: jax.stages.Compiled
    trace_seconds: float  # to StableHLO
    compile_seconds: float  # little where a cache on disk has it


def built(function: Any, *args: Any, **options: Any) -> Built:
    """Compiles a function of `jax.jit`, or what else can be traced."""
    start = time.perf_counter()
    lowered = function.trace(*args, **options).lower()
    traced = time.perf_counter()
    program = lowered.compile()
    return Built(program, traced - start, time.perf_counter() - traced)


def planned_gib(program: jax.stages.Compiled) -> float:
    """Memory on each device, as the compiler planned it: arguments, results and temporaries."""
    found = program.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return (found.argument_size_in_bytes + results + found.temp_size_in_bytes) / GIB


def peak_gib(devices: list[Any]) -> float | None:
    """The most that was ever in use on one of these devices; None where they do not tell."""
    told = [stats["peak_bytes_in_use"] for d in devices if (stats := d.memory_stats())]
    return max(told) / GIB if told else None


def load(
    path: str, changes: Mapping[str, Any] | None = None, devices: int | None = None
) -> Experiment:
    """The experiment of a config file, `path.py` or `path.py:variant`, on so many devices (all).

    Early heads of blocks that a smaller `depth` leaves out move to the last block but one.

    Args:
      changes: dotted name -> value; None leaves what the file says.

    Raises:
      UserError: there is no such file, or it and the changes make no run.
    """
    file, _, variant = path.partition(":")
    if not (ROOT / file).is_file():
        raise UserError(f"--config={path}: no such file in {ROOT}; see configs/")
    spec = importlib.util.spec_from_file_location("config_of_benchmark", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c: ConfigDict = module.get_config(*[variant] * bool(variant))
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    c.update_from_flattened_dict(given)
    c.model.readouts = tuple(sorted({min(d, c.model.depth - 1) for d in c.model.readouts}))
    found = jax.devices()[:devices]
    if devices and len(found) < devices:
        raise UserError(f"--devices={devices}: there are {len(found)} {found[0].device_kind}")
    return experiment.experiment(run_config.parse(c, len(found)), found)


def add_flags(parser: argparse.ArgumentParser, config_file: str = "configs/sit_xl.py") -> None:
    """What every benchmark of speed takes: the network, the devices, and where the record goes."""
    parser.add_argument("--config", default=config_file, help="a file, or file:variant")
    parser.add_argument("--batch", type=int, help="images over all devices; else the config's")
    for name, kind in MODEL_FLAGS.items():
        parser.add_argument(f"--{name}", type=kind, help="of the model; else the config's")
    parser.add_argument("--devices", type=int, help="how many are used; all by default")
    parser.add_argument("--peak_tflops", type=float, help="of a device that chips.py lacks")
    parser.add_argument("--windows", type=int, default=5, help="timed; their median is told")
    parser.add_argument("--calls", type=int, default=4, help="in each window")
    parser.add_argument("--json", type=Path, help="also write all results to this file")


def changes(flags: argparse.Namespace) -> dict[str, Any]:
    """Those that the flags of `add_flags` ask of a config."""
    model = {f"model.{name}": getattr(flags, name) for name in MODEL_FLAGS}
    sizes = {"train.batch_size": flags.batch, "sample.batch_size": flags.batch}
    return {**model, **sizes, "log.peak_tflops": flags.peak_tflops}


def machine(devices: list[Any]) -> dict[str, Any]:
    """Where and with what something ran."""
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "versions": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
            "commit": checkpoint_manager.versions().get("ig_jax"),  # None outside of a repository
        },
    }


def circumstances(exp: Experiment, flags: argparse.Namespace) -> dict[str, Any]:
    """What a number cannot be read without."""
    model = exp.config.raw["model"]
    return {
        "config": flags.config,
        "model": {name: model[name] for name in ("name", *MODEL_FLAGS)},
        "mesh": dict(exp.mesh.shape),
        **machine(exp.mesh.devices.ravel().tolist()),
        "windows": flags.windows,
        "calls": flags.calls,
    }


def heading(record: Mapping[str, Any]) -> str:
    """`circumstances`, or `machine` alone, in a line."""
    versions = record["versions"]
    where = f"{record['device']}, jax {versions['jax']}, commit {versions['commit']}"
    if "config" not in record:
        return f"{record['devices']} x {where}"
    m = record["model"]
    network = f"depth {m['depth']}, width {m['hidden_size']}, {m['dtype']}, remat {m['remat']}"
    mesh = " x ".join(str(n) for n in record["mesh"].values())
    return f"{record['config']} ({network}), mesh {mesh} of {where}"


def shown(value: float | None, digits: str = ".3g") -> str:
    """A number in a table; empty where there is none."""
    return "" if value is None else format(value, digits)


def tell(record: Mapping[str, Any], *tables: list[list[str]], json_file: Path | None) -> None:
    """Prints the tables, and writes the record where a file is named."""
    print("\n\n".join([heading(record), *map(console.markdown, tables)]))
    if json_file:
        json_file.write_text(json.dumps(record, indent=2) + "\n")


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Ends the program with one sentence where what it was asked for cannot be."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
