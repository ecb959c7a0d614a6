"""--dry_run: parameters, bytes and the sampling grid, without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ig_jax import pytree
from ig_jax.experiment import Experiment
from ig_jax.generation.cost import cost
from ig_jax.generation.generator import Generator
from ig_jax.monitoring import flops
from ig_jax.monitoring.peak_flops import peak_flops
from ig_jax.objectives.metrics import BY_TIME
from ig_jax.optim import ema
from ig_jax.optim.train_state import HEADS_OF_TERMS, trained
from ig_jax.parallel import partitioning
from ig_jax.parallel.mesh import bytes_each, parts_of_batch
from ig_jax.programs import guide_model, memory_check
from ig_jax.training import step
from ig_jax.training.step import Noised
from ig_jax.types import Params

MIB = 2**20
_SHOWN = 12  # times, at most
_REFERENCES = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "TPU v5e")
_UTILISATION = 0.4  # of a device's peak: what large transformers commonly reach in training


def _modules(exp: Experiment) -> list[str]:
    """Parameters and MiB of every module, one line each."""
    leaves = trained(exp.abstract_params, exp.abstract_terms)
    modules: dict[str, object] = {}
    for name, value in leaves.items():
        if name in ("blocks", "heads", HEADS_OF_TERMS):
            modules |= {f"{name}.{part}": module for part, module in value.items()}
        else:
            modules[name] = value
    lines = [f"{'module':<24}{'parameters':>14}{'MiB':>10}"]
    for name, module in modules.items():
        lines.append(
            f"{name:<24}{pytree.count(module):>14,}{pytree.num_bytes(module) / MIB:>10.2f}"
        )
    total = pytree.count(leaves)
    lines.append(f"{'total':<24}{total:>14,}{pytree.num_bytes(leaves) / MIB:>10.2f}")
    return lines


def _kept_for_gradients(exp: Experiment, rows: int) -> int:
    """Bytes that the forward pass of so many images leaves for the backward pass, as traced.

    Weights in the network's dtype are among it. What the compiled program needs beside, and what it
    saves, is not.
    """
    source, state = exp.config.data.source, exp.abstract_state
    teacher = trained(state.ema[ema.name(exp.teacher_decay)], state.ema_terms)

    def residuals(params: Params, batch: Noised) -> Any:
        *inputs, mirrored = batch

        def loss(params: Params) -> Any:
            return exp.objective(params, *inputs, teacher, 0, state.frozen, mirrored)

        _, backward, _ = jax.vjp(loss, params, has_aux=True)
        return backward

    stored = jax.ShapeDtypeStruct((rows, *source.stored_shape), source.stored_dtype)
    batch = {"stored": stored, "label": jax.ShapeDtypeStruct((rows,), jnp.int32)}
    noised = jax.eval_shape(lambda b: step.noise(exp, b, 0, exp.encoder_weights), batch)
    return pytree.num_bytes(jax.eval_shape(residuals, state.trained, noised))


def _hours(exp: Experiment, count: int) -> list[str]:
    """A line with the hours of `count` FLOPs on some devices, and on those here where known."""
    device = exp.mesh.devices.flat[0].device_kind
    known = {device: peak_flops(device), **{name: peak_flops(name) for name in _REFERENCES}}
    named = exp.config.log.peak_tflops
    if named is not None:
        known = {f"a device of {named:g} TFLOP/s": named * 1e12}
    hours = {name: count / (_UTILISATION * peak) / 3600 for name, peak in known.items() if peak}
    if max(hours.values()) < 1:
        return []
    each = ", ".join(f"{number:,.0f} hours of {name}" for name, number in hours.items())
    return [f"time: {each}, at {_UTILISATION:.0%} of the peak"]


def _training(exp: Experiment) -> list[str]:
    """Shape-checks a training step; says what its state takes."""
    c = exp.config
    state = exp.abstract_state
    n = c.train.batch_size
    batches = {
        "stored": jax.ShapeDtypeStruct(
            (1, n, *c.data.source.stored_shape), c.data.source.stored_dtype
        ),
        "label": jax.ShapeDtypeStruct((1, n), jnp.int32),
    }
    _, metrics = jax.eval_shape(step.make_dispatch(exp), state, batches, exp.encoder_weights)
    size, each = pytree.num_bytes(state) / MIB, bytes_each(state) / MIB
    mesh = " x ".join(f"{name} {size}" for name, size in exp.mesh.shape.items())
    steps, dataset = exp.total_steps, len(c.data.source)
    rows = n // c.train.accumulation // parts_of_batch(exp.mesh)
    kept, total = _kept_for_gradients(exp, rows), exp.gradient_flops(n) * steps
    lines = [
        f"training: {steps:,} steps of {n} images, {steps * n:,} in all, or "
        f"{steps * n / dataset:,.3g} epochs of {dataset:,}; {flops.in_words(total)}",
        *_hours(exp, total),
        f"memory: parameters, optimizer and averages take {size:,.1f} MiB; the backward pass keeps "
        f"about {kept / MIB:,.1f} MiB a device, of {rows} images at a time",
        f"metrics: {', '.join(name for name in metrics if not name.startswith(BY_TIME))}",
        f"mesh: {mesh}; of the state, each device holds {each:,.1f} MiB",
    ]
    if hasattr(c.data.source, "summary"):
        lines.append(f"data: {c.data.source.summary()}")
    short = memory_check.shortage(exp, "train")
    if short:
        lines.append(f"training does not fit here: {short}")
    leaves = trained(exp.abstract_params, exp.abstract_terms)
    whole = partitioning.kept_whole(exp.mesh, exp.axes, leaves)
    if whole:
        lines.append(f"not divisible over data, so whole on each device: {', '.join(whole)}")
    return lines


def _sampling(exp: Experiment) -> list[str]:
    """Shape-checks the sampler; shows which guidance is on in which steps."""
    s = exp.config.sample
    n = s.batch_size
    generator = exp.pipeline.generator(guide=guide_model.load(exp.pipeline))
    generator.trace(
        exp.abstract_params,
        jax.ShapeDtypeStruct((), jnp.uint32),
        *[jax.ShapeDtypeStruct((n,), jnp.int32)] * 2,
    )
    short = memory_check.shortage(exp, "sample")
    plan = generator.plan()
    lines = [
        f"sampling: {type(s.sampler).__name__}, {_cost(generator)}; t = 1 is noise",
        *[f"sampling does not fit here: {short}"] * bool(short),
        f"times: {_times(plan.grid)}",
        f"{'steps':>9}{'from t':>10}{'to t':>10}   guidance",
    ]
    for segment in plan.segments:
        on = [f"{kind} {g.scale:g}" for kind, g in s.guidances.items() if kind in segment.on]
        first, last = segment.start, segment.stop - 1
        steps = f"{first}" if first == last else f"{first}-{last}"
        ends = "".join(f"{plan.grid[i]:>10.4f}" for i in (first, last + 1))
        lines.append(f"{steps:>9}{ends}   {', '.join(on) or 'off'}")
    return lines


def _times(grid: Sequence[float]) -> str:
    """The times of a grid, of a long one the first and the last."""
    shown = [f"{t:.4f}" for t in grid]
    return ", ".join(shown if len(shown) <= _SHOWN else [*shown[:6], "...", *shown[-3:]])


def _cost(generator: Generator) -> str:
    """Steps, network evaluations and FLOPs of one sample."""
    sampler, count = generator.sampling.sampler, cost(generator)
    if count is None:
        return f"at most {sampler.num_steps} steps of its own choice on each line below"
    others = {"to_readout": "to the readout", "of_the_guide": "of the guiding network"}
    rest = "".join(f" and {count[name]} {where}" for name, where in others.items() if count[name])
    return (
        f"{len(sampler.grid()) - 1} steps, {count['evaluations']} network evaluations a sample"
        f"{rest}, {flops.in_words(count['flops'])}"
    )


def describe(exp: Experiment) -> str:
    """All of it as text. Raises what building and tracing raise."""
    return "\n".join([*_modules(exp), "", *_training(exp), "", *_sampling(exp)])
