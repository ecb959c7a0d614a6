"""How long the full SiT-XL/2 + Internal Guidance train step takes to trace and compile, here.

  python benchmarks/compile_xl.py [--unroll=1] [--remat=full] [--batch=8]

Nothing is computed and no weights are made: the step is lowered on abstract arrays (AdamW, one EMA,
bfloat16 compute, 32 x 32 x 4 latents, 1000 classes) and compiled for this machine's devices.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ig_jax import ema, optim, train
from ig_jax.checkpoint import TrainState
from ig_jax.diffusion.flow import Flow
from ig_jax.models.sit import SIZES, SiT, SiTSettings
from ig_jax.objectives import TERMS
from ig_jax.objectives.base import Objective

ADAMW = optim.AdamWSettings(1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0, 0, "constant")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--unroll", type=int, default=1, help="blocks per iteration of the scan")
    parser.add_argument("--remat", default="full", help="none, dots or full")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()

    depth, hidden_size, heads = SIZES["XL"]
    settings = SiTSettings(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=heads,
        patch_size=2,
        mlp_ratio=4.0,
        qk_norm=False,
        readouts=(8,),
        time_scale=1.0,
        dtype="bfloat16",
        remat=args.remat,
        unroll=args.unroll,
    )
    net = SiT(settings, side=32, channels=4, num_classes=1000)
    process = Flow("linear", "uniform")
    terms = {"flow": TERMS["flow"](1.0), "internal_guidance": TERMS["internal_guidance"](0.5)}
    objective = Objective(net, process, terms, label_drop=0.1, null_class=1000)
    optimizer = optim.adamw(ADAMW, total_steps=1)

    def init() -> TrainState:
        params = net.init(jax.random.key(0))
        averages = ema.init(params, (0.9999,))
        return TrainState(jnp.int32(0), params, optimizer.init(params), averages)

    def step(state, x0, labels, key):
        draws = objective.draw(key, x0)
        return train.update(state, x0, labels, draws, objective=objective, optimizer=optimizer)

    x0 = jax.ShapeDtypeStruct((args.batch, 32, 32, 4), jnp.float32)
    labels = jax.ShapeDtypeStruct((args.batch,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(init)

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, x0, labels, key)
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    compiled_at = time.perf_counter()
    memory = compiled.memory_analysis()
    report = {
        "unroll": args.unroll,
        "remat": args.remat,
        "batch": args.batch,
        "trace_and_lower_seconds": round(lowered_at - start, 2),
        "compile_seconds": round(compiled_at - lowered_at, 2),
        "stablehlo_lines": lowered.as_text().count("\n"),
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
