"""How long a full-size train step takes to compile here, and its FLOPs, counted twice.

  python benchmarks/train_step.py [--config=configs/lightningdit_xl.py] [--unroll=1] [--remat=full]

Nothing is computed and no weights are made: the step of a config (with its optimizer and averages)
is lowered on abstract arrays and compiled for this machine's devices. XLA's own count is taken from
the step before it is compiled, with the blocks unrolled, because it counts a loop's body once; it
is compared with the counts on paper: `flops.train_step` for the gradient, `newton_schulz_flops` for
Muon.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ig_jax import build, config, flops, train
from ig_jax.build import Experiment
from ig_jax.optim.muon import newton_schulz_flops


def load(path: str, **model: object) -> Experiment:
    """The experiment of a config file (`path.py` or `path.py:variant`), fields of model changed."""
    file, _, variant = path.partition(":")
    spec = importlib.util.spec_from_file_location("config", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c: ConfigDict = module.get_config(*[variant] * bool(variant))
    c.model.update({name: value for name, value in model.items() if value is not None})
    return build.experiment(config.parse(c), jax.devices()[:1])


def abstract_batch(exp: Experiment, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    source = exp.config.data.source
    return {
        "stored": jax.ShapeDtypeStruct((images, *source.stored_shape), source.stored_dtype),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }


def lower(exp: Experiment, images: int) -> jax.stages.Lowered:
    state = exp.abstract_state
    step = jax.jit(lambda s, b: train.train_step(s, b, exp=exp), donate_argnums=0)
    return step.lower(state, abstract_batch(exp, images))


def optimizer_flops(exp: Experiment) -> float:
    """Of one update without the gradient, as XLA counts them."""
    abstract = exp.abstract_params
    state = jax.eval_shape(exp.optimizer.init, abstract)
    return jax.jit(exp.optimizer.update).lower(abstract, state, abstract).cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/lightningdit_xl.py")
    parser.add_argument("--unroll", type=int, help="blocks per iteration of the scan")
    parser.add_argument("--remat", help="none, dots or full")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    exp = load(args.config, unroll=args.unroll, remat=args.remat)
    start = time.perf_counter()
    lowered = lower(exp, args.batch)
    lowered_at = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    compiled_at = time.perf_counter()

    unrolled = load(args.config, unroll=exp.config.model.depth, remat="none")
    counted, of_optimizer = (
        lower(unrolled, args.batch).cost_analysis()["flops"],
        optimizer_flops(exp),
    )
    model = (counted - of_optimizer) / args.batch
    paper = flops.train_step(exp.net, exp.abstract_params, batch_size=1)
    report = {
        **dataclasses.asdict(exp.config.model),
        "batch": args.batch,
        "trace_and_lower_seconds": round(lowered_at - start, 2),
        "compile_seconds": round(compiled_at - lowered_at, 2),
        "stablehlo_lines": lowered.as_text().count("\n"),
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "model_gflop_an_image": {"xla": round(model / 1e9, 3), "paper": round(paper / 1e9, 3)},
        "optimizer_tflop_a_step": {"xla": round(of_optimizer / 1e12, 3)},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if exp.config.raw["optim"]["name"] == "muon":
        of_muon = newton_schulz_flops(exp.abstract_params, exp.config.optim.ns_steps)
        report["optimizer_tflop_a_step"]["paper"] = round(of_muon / 1e12, 3)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
