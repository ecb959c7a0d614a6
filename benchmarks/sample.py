"""How fast samples are drawn, and whether guidance costs what its evaluations must.

  python benchmarks/sample.py [--config=configs/sit_xl.py] [--batch=64] [--steps=50] [--no_cfg]
  python benchmarks/sample.py --config=configs/digits.py --batch=16 --calls=1    # on a CPU

The config's guidance is set side by side with less of it, in one run: none, IG, CFG over its
interval, CFG everywhere, IG and CFG. An evaluation is a pass of one image through the network; IG
adds none, CFG one wherever it is on. `time / evaluations` is the time of a sample over that without
guidance, divided by the same ratio of evaluations: 1 where guided sampling costs what it must. A
scale that the config has off is taken as 1.4, which changes no time.

Weights are fresh ones. The sampler is that of `Generator`, without its decoder: the network
and the steps. Latents of 4 channels are decoded as well, by the Stable Diffusion autoencoder at
random weights, with the numbers it is published with: 83.7 million in its two halves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from benchmarks.measuring import Seconds
from ig_jax import guidance, prng
from ig_jax.codecs import kl_names, sd_vae
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.generation.cost import cost as cost_of
from ig_jax.generation.generator import Generator
from ig_jax.guidance import Guidances
from ig_jax.monitoring import peak_flops
from ig_jax.parallel.mesh import over_batch, replicated, to_global
from ig_jax.samplers import SAMPLERS
from ig_jax.types import DTYPES, Params

TERA = 1e12
ON = 1.4  # any scale but 1 costs the same
SD_VAE = kl_names.Sizes((128, 256, 512, 512), 2, frozenset(), latent_channels=4)


def settings(exp: Experiment, *, ig: bool = True, cfg: bool = True) -> dict[str, Guidances]:
    """Name of a row -> guidances: those of the config, switched on and off."""
    found = {
        kind: g if g.scale != 1 else replace(g, scale=ON)
        for kind, g in exp.config.sample.guidances.items()
    }
    everywhere = found | {"cfg": replace(found["cfg"], low=0.0, high=1.0)}
    rows = {
        "none": guidance.only(found, ()),
        "IG": guidance.only(found, ("ig",)),
        "CFG on its interval": guidance.only(found, ("cfg",)),
        "CFG everywhere": guidance.only(everywhere, ("cfg",)),
        "IG and CFG": guidance.only(found, ("ig", "cfg")),
    }
    has_ig = ig and exp.config.readout is not None
    left = {kind for kind, has in {"IG": has_ig, "CFG": cfg}.items() if not has}
    return {name: g for name, g in rows.items() if not left & set(name.split())}


def cost(generator: Generator, guidances: Guidances) -> Mapping[str, int]:
    """Evaluations and FLOPs of one sample.

    Raises:
      UserError: the sampler chooses its own steps.
    """
    found = cost_of(generator, guidances=guidances)
    if found is None:
        kind = type(generator.sampling.sampler)
        name = next(name for name, known in SAMPLERS.items() if known is kind)
        raise UserError(
            f"sample.sampler.name = {name!r}: chooses its own steps, so its evaluations are not "
            "known beforehand; take a config with another"
        )
    return found


def rates(exp: Experiment, of_image: int, seconds_per_image: float) -> dict[str, float | None]:
    """Model TFLOP/s of each device, and its share of what the device can."""
    rate = of_image / seconds_per_image / exp.local_mesh.size
    told = exp.config.log.peak_tflops
    peak = told * TERA if told else peak_flops.peak_flops(exp.mesh.devices.flat[0].device_kind)
    return {"model_tflops_per_device": rate / TERA, "mfu": rate / peak if peak else None}


def one_setting(
    exp: Experiment, guidances: Guidances, params: Params, time: Callable[..., Seconds]
) -> dict[str, Any]:
    """The record of a batch of latents under some guidance."""
    size = exp.config.sample.batch_size
    generator = exp.pipeline.generator(decode=lambda latents: latents)
    indices = np.arange(size, dtype=np.int32)
    host = {"i": indices, "y": indices % exp.num_classes}
    rows = to_global(host, exp.local_mesh, size)
    given = (params, jnp.uint32(0), rows["i"], rows["y"])
    built = measuring.built(generator, *given, guidances=guidances)
    took = time(lambda: generator(*given, guidances=guidances))
    of_image = cost(generator, guidances)
    return {
        "evaluations": of_image["evaluations"],
        "images_per_second": size / took.median,
        "seconds_per_batch": took._asdict(),
        "tflop_per_image": of_image["flops"] / TERA,
        **rates(exp, of_image["flops"], took.median / size),
        "planned_gib": measuring.planned_gib(built.program),
        "compile_seconds": built.trace_seconds + built.compile_seconds,
    }


def random_decoder(sizes: kl_names.Sizes) -> Params:
    """Weights of an autoencoder's second half, small enough to keep its activations finite."""
    shapes = {name: kl_names.shapes(sizes)[name] for name in ("post_quant_conv", "decoder")}
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.02 * rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def decoding(
    exp: Experiment, sizes: kl_names.Sizes, time: Callable[..., Seconds]
) -> dict[str, Any]:
    """Dtype -> the record of decoding one batch of latents."""
    size = exp.config.sample.batch_size
    whole = replicated(exp.local_mesh)
    weights = jax.device_put(random_decoder(sizes), whole)
    keys = prng.sample_keys(0, jnp.arange(size))
    latents = prng.sample_normal(keys, exp.net.latent_shape, prng.LATENTS)
    given = (weights, jax.device_put(latents, over_batch(exp.local_mesh)))
    found = {}
    for name, dtype in DTYPES.items():
        built = measuring.built(jax.jit(partial(sd_vae.decode, dtype=dtype)), *given)
        took = time(lambda program=built.program: program(*given))
        found[name] = {
            "images_per_second": size / took.median,
            "seconds_per_batch": took._asdict(),
            "planned_gib": measuring.planned_gib(built.program),
            "compile_seconds": built.trace_seconds + built.compile_seconds,
        }
    return found


def measure(exp: Experiment, flags: argparse.Namespace) -> dict[str, Any]:
    time = partial(measuring.seconds, calls=flags.calls, windows=flags.windows)
    placed = replicated(exp.local_mesh)
    params = jax.jit(exp.net.init, out_shardings=placed)(prng.key(exp.config.seed, "init"))
    rows = settings(exp, ig=not flags.no_ig, cfg=not flags.no_cfg)
    found = {name: one_setting(exp, g, params, time) for name, g in rows.items()}
    decodes = exp.net.channels == SD_VAE.latent_channels
    return {
        "batch": exp.config.sample.batch_size,
        "sampler": exp.config.raw["sample"]["sampler"],
        "settings": found,
        "decoder": decoding(exp, SD_VAE, time) if decodes else {},
        "peak_gib": measuring.peak_gib(exp.local_mesh.devices.ravel().tolist()),
    }


def against_plain(settings: Mapping[str, Any], name: str) -> float:
    """Time over that without guidance, divided by the same ratio of evaluations."""
    this, plain = settings[name], settings["none"]
    times = this["seconds_per_batch"]["median"] / plain["seconds_per_batch"]["median"]
    return times / (this["evaluations"] / plain["evaluations"])


def settings_table(found: Mapping[str, Any]) -> list[list[str]]:
    head = ["guidance", "evaluations", "images/s", "s/batch", "spread", "time / evaluations"]
    head += ["TFLOP/image", "TFLOP/s a device", "MFU", "planned GiB", "compile s"]
    rows, shown = [head], measuring.shown
    for name, each in found["settings"].items():
        took = Seconds(**each["seconds_per_batch"])
        row = [name, str(each["evaluations"]), f"{each['images_per_second']:.4g}"]
        row += [f"{took.median:.4g}", took.spread]
        row += [f"{against_plain(found['settings'], name):.3f}", shown(each["tflop_per_image"])]
        row += [shown(each["model_tflops_per_device"]), shown(each["mfu"], ".1%")]
        rows.append([*row, shown(each["planned_gib"]), f"{each['compile_seconds']:.1f}"])
    return rows


def decoder_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Beside the last row of the settings."""
    *_, network = found["settings"].values()
    drawn = network["seconds_per_batch"]["median"]
    rows = [["decoder", "images/s", "s/batch", "spread", "of drawing and decoding", "planned GiB"]]
    for name, each in found["decoder"].items():
        took = Seconds(**each["seconds_per_batch"])
        row = [name, f"{each['images_per_second']:.4g}", f"{took.median:.4g}", took.spread]
        rows.append([*row, f"{took.median / (took.median + drawn):.1%}"])
        rows[-1].append(measuring.shown(each["planned_gib"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    measuring.add_flags(parser)
    parser.add_argument("--steps", type=int, help="of the sampler; else the config's")
    parser.add_argument("--no_ig", action="store_true", help="leave out the rows with IG")
    parser.add_argument("--no_cfg", action="store_true", help="leave out the rows with CFG")
    flags = parser.parse_args()
    asked = measuring.changes(flags) | {"sample.sampler.num_steps": flags.steps}
    with measuring.mistakes_told():
        exp = measuring.load(flags.config, asked, flags.devices)
        record = {"what": "sample", **measuring.circumstances(exp, flags), **measure(exp, flags)}
    tables = [settings_table(record)] + [decoder_table(record)] * bool(record["decoder"])
    measuring.tell(record, *tables, json_file=flags.json)


if __name__ == "__main__":
    main()
