"""What a train step or the sampler takes of a TPU, found by compiling it where there is none.

  python benchmarks/tpu_aot.py [--config=configs/lightningdit_xl.py] [--batch=48]
  python benchmarks/tpu_aot.py --topology=v6e:2x4 --what=sample --json=runs/tpu_aot.json

Needs libtpu (`pip install -r requirements.txt "jax[tpu]"`), which compiles for a topology that is
only described; an XL step takes it one to five minutes. Reported for each device: memory beside
what the chip has, and what devices send each other. With --json all results are kept in that file,
one a setting, with every array that is sent; the table printed has them all.

XLA's own count of FLOPs is left out: it counts the body of a loop once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import hlo
from ig_jax import experiment
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.parallel.mesh import TENSOR, over_batch, replicated
from ig_jax.training import step

GIB = 2**30
# What the compiler of libtpu 0.0.50 leaves to a program of a chip's 32, 16, 95 and 32.
HBM_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
MISSING = (
    "libtpu is not installed: it compiles for TPUs where there is none; "
    'install it with `pip install -r requirements.txt "jax[tpu]"`'
)
# A slice's metadata server would tell the first three. The last lets two of these programs run at
# once: no chip is opened that they could take from each other.
DESCRIBED = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
SETTINGS = ("what", "config", "topology", "mesh", "remat", "batch_per_device")  # of a result


def chip(topology: str) -> str:
    """The kind of chip of a topology such as v5e:2x4.

    Raises:
      UserError: it is not one of HBM_GIB, or its shape is not numbers.
    """
    found = re.fullmatch(r"(\w+):\d+(x\d+)+", topology)
    if not found or found[1] not in HBM_GIB:
        raise UserError(
            f"--topology={topology}: must be a chip and a shape, such as v5e:2x4 or v4:2x2x1; "
            f"chips: {', '.join(HBM_GIB)}"
        )
    return found[1]


def described_devices(topology: str) -> list[Any]:
    """Devices that can be compiled for, but hold nothing; two cores of a v4 chip are one."""
    os.environ |= DESCRIBED
    jax.config.update("jax_platforms", "cpu")  # the default, as the chips are not there
    options = {"chip_config_name": "megacore"} if chip(topology) == "v4" else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def settings(args: argparse.Namespace, devices: int) -> ConfigDict:
    """The config of the file that --config names, with what the other flags say.

    Raises:
      UserError: there is no such file.
    """
    if not (ROOT / args.config).is_file():
        raise UserError(f"--config={args.config}: no such file in {ROOT}; see configs/")
    name = Path(args.config).with_suffix("").as_posix().replace("/", ".")
    c = importlib.import_module(name).get_config()
    c.mesh.fsdp = args.fsdp or devices
    c.model.remat = args.remat or c.model.remat
    c.train.batch_size = c.sample.batch_size = args.batch * devices
    return c


def lower_step(exp: Experiment) -> jax.stages.Lowered:
    """One update of everything in a training state."""
    source, rows = exp.config.data.source, (1, exp.config.train.batch_size)
    batches = {
        "stored": jax.ShapeDtypeStruct((*rows, *source.stored_shape), source.stored_dtype),
        "label": jax.ShapeDtypeStruct(rows, jnp.int32),
    }
    return step.make_dispatch(exp).lower(exp.abstract_state, batches, {})


def lower_sampler(exp: Experiment) -> jax.stages.Lowered:
    """The config's sampler with all its steps, without a decoder, on the first host of a slice."""
    mesh = exp.local_mesh
    generator = exp.pipeline.generator(decode=lambda latents: latents)
    whole, rows = replicated(mesh), over_batch(mesh)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), exp.abstract_params
    )
    size = exp.config.sample.batch_size * mesh.size // exp.mesh.size
    row = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows)
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
    return generator.trace(params, seed, row, row).lower()


LOWER = {"train": lower_step, "sample": lower_sampler}


def memory(compiled: jax.stages.Compiled, available: float) -> dict[str, Any]:
    """GiB of a device: what stays, what comes and goes, and whether both fit."""
    found = compiled.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "new_outputs": new,
        "updated_in_place": found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    needed = sum(size for name, size in parts.items() if name != "updated_in_place")
    report = {name: round(size / GIB, 3) for name, size in parts.items()}
    return report | {"needed": round(needed / GIB, 3), "available": available}


def refusal(message: str) -> str:
    """What XLA says of memory that is not there."""
    found = re.search(r"temporaries \([\d.]+\w\) exceeds available HBM \([\d.]+\w\)", message)
    return found[0] if found else message.splitlines()[0]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The report on one program."""
    devices = described_devices(args.topology)
    exp = experiment.experiment(
        run_config.parse(settings(args, len(devices)), len(devices)), devices
    )
    trains = args.what == "train"
    report = {
        "what": args.what,
        "config": args.config,
        "topology": args.topology,
        "mesh": dict((exp.mesh if trains else exp.local_mesh).shape),
        "remat": exp.config.model.remat if trains else "",
        "batch_per_device": args.batch,
        "versions": {
            "jax": jax.__version__,
            "libtpu": importlib.metadata.version("libtpu"),
            "python": platform.python_version(),
        },
    }
    with mock.patch.object(jax, "default_backend", lambda: "tpu"):
        lowered = LOWER[args.what](exp)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report | {"fits": False, "refused": refusal(str(error))}
    seconds = time.perf_counter() - start
    if trains:
        of_gradient = exp.gradient_flops(args.batch)
        report["gradient_tflop"] = round(of_gradient / exp.mesh.shape[TENSOR] / 1e12, 2)
    used = memory(compiled, HBM_GIB[chip(args.topology)])
    return report | {
        "fits": used["needed"] <= used["available"],  # XLA compiles somewhat more
        "memory_gib": used,
        "collectives": hlo.report(compiled.as_text()),
        "compile_seconds": round(seconds, 1),
    }


def _ordered(value: Any) -> Any:
    return list(value.values()) if isinstance(value, dict) else value


def keep(file: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All reports of `file` with this one, instead of an older one of the same settings."""
    found = json.loads(file.read_text()) if file.exists() else []
    others = [r for r in found if any(r[key] != report[key] for key in SETTINGS)]
    reports = sorted([*others, report], key=lambda r: [_ordered(r[key]) for key in SETTINGS])
    file.write_text("[\n" + ",\n".join(map(json.dumps, reports)) + "\n]\n")  # one a line
    return reports


def row(report: Mapping[str, Any]) -> list[Any]:
    mesh = " x ".join(str(size) for size in report["mesh"].values())
    what = [report["topology"], Path(report["config"]).stem, report["what"], mesh]
    what += [report["remat"], report["batch_per_device"]]
    if "refused" in report:
        return [*what, "", "", f"refused: {report['refused']}", "", "", ""]
    used = report["memory_gib"]
    return [
        *what,
        f"{used['arguments']:.2f}",
        f"{used['temporaries']:.2f}",
        f"{used['needed']:.2f} of {used['available']}" + " (too much)" * (not report["fits"]),
        hlo.summary(report["collectives"], in_loop=True),
        hlo.summary(report["collectives"], in_loop=False),
        f"{report['compile_seconds']:.0f}",
    ]


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; memory is GiB of one device."""
    head = ["topology", "config", "what", "data x fsdp x tensor", "remat", "images a device"]
    head += ["arguments", "temporaries", "needed of usable", "sent in a pass of a loop"]
    head += ["sent outside", "compile s"]
    lines = [head, ["---"] * len(head), *map(row, reports)]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/sit_xl.py")
    parser.add_argument("--topology", default="v5e:2x4", help="chip and shape of a slice")
    parser.add_argument("--what", default="train", choices=LOWER)
    parser.add_argument("--batch", type=int, default=32, help="images on each device")
    parser.add_argument("--fsdp", type=int, help="of the mesh; all devices by default")
    parser.add_argument("--remat", help="none, dots or full; the config's by default")
    parser.add_argument("--json", type=Path, help="file of results, to which this is added")
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print(MISSING, file=sys.stderr)
        sys.exit(2)
    try:
        report = measure(args)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(table(keep(args.json, report) if args.json else [report]))


if __name__ == "__main__":
    main()
