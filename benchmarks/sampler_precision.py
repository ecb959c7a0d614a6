"""How far a float32 sampling state strays from a float64 one (the published samplers keep float64).

  python benchmarks/sampler_precision.py [--workdir=runs/digits] [--steps=250]

The network is float32 in both, as in the published code; the trained weights of the workdir are
used, with the guidance of its config. Prints the error of the final latents for every sampler on a
fixed grid: root mean square and largest, beside the spread of the latents.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measuring
from ig_jax import guidance, prng
from ig_jax.generation import plan as generation_plan
from ig_jax.programs import guide_model, run_record
from ig_jax.samplers import SAMPLERS, base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--workdir", type=Path, default=Path("runs/digits"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()

    exp = measuring.load(args.config, devices=1)
    _, params = run_record.load_weights(exp, args.workdir)
    s, guide = exp.config.sample, guide_model.load(exp.pipeline)
    keys = prng.sample_keys(0, jnp.arange(args.samples))
    labels = jnp.arange(args.samples) % exp.num_classes
    shape = exp.net.latent_shape

    def final(sampler, dtype) -> np.ndarray:
        plan = generation_plan.plan(exp.config.process, sampler, s.guidances, s.time_shift)
        guided = guidance.Guided(
            exp.net,
            params,
            exp.config.process,
            labels,
            null_class=exp.num_classes,
            scales={kind: g.scale for kind, g in s.guidances.items()},
            channels=dict(plan.channels),
            readout=exp.pipeline.generator(decode=lambda x: x).readout,
            guide=guide,
        )

        def trajectory(x):
            return base.sample(
                sampler,
                np.array(plan.grid),
                guided.fields(plan.segments),
                x,
                lambda i: prng.sample_normal(keys, shape, prng.FIRST_STEP + i),
            )

        x = prng.sample_normal(keys, shape, prng.LATENTS)
        return np.asarray(jax.jit(trajectory)(x.astype(dtype)), np.float64)

    print(f"{'sampler':<16}{'rms error':>12}{'max error':>12}{'std of latents':>16}")
    for name, sampler in SAMPLERS.items():
        if sampler.adaptive:
            continue  # its tolerances, not the state's precision, are its error
        if sampler.process and not isinstance(exp.config.process, sampler.process):
            continue
        single = final(sampler(args.steps), jnp.float32)
        jax.config.update("jax_enable_x64", True)
        double = final(sampler(args.steps), jnp.float64)
        jax.config.update("jax_enable_x64", False)
        error = np.abs(single - double)
        rms = np.sqrt(np.mean(error**2))
        print(f"{name:<16}{rms:>12.1e}{error.max():>12.1e}{double.std():>16.2f}")


if __name__ == "__main__":
    main()
