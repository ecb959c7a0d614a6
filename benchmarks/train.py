"""How fast a training step is, what it is made of, what it takes of memory, how long it compiles.

  python benchmarks/train.py [--config=configs/sit_xl.py] [--batch=256] [--remat=none]
  python benchmarks/train.py --depth=4 --hidden_size=256 --batch=8 --calls=1    # on a CPU
  python benchmarks/train.py --compile_only [--config=configs/lightningdit_xl.py] [--batch=8]

The step is the one that training runs (`training.step.make_dispatch`, with the config's optimizer
and averages, the state donated), on the first examples of the config's data, which stay on the
devices: benchmarks/data.py measures loading. TFLOP/s and MFU are of the model
(ig_jax/monitoring/flops.py): what is computed again counts nothing. The parts are programs of their
own on the same shapes. Their sum is about the step: each writes out what the step's one program
need not, and cannot overlap the others.

--compile_only makes no weights and computes nothing. The step is lowered on abstract arrays and
compiled for these devices, and FLOPs are counted twice: XLA's own count, from programs that are not
compiled yet, with the blocks unrolled, because it counts a loop's body once; and that on paper:
`Experiment.gradient_flops` for the gradient, `newton_schulz_flops` for Muon.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from benchmarks.measuring import Seconds
from ig_jax import prng
from ig_jax.experiment import Experiment
from ig_jax.models import trunk
from ig_jax.monitoring import flops
from ig_jax.optim import ema
from ig_jax.optim.muon import newton_schulz_flops
from ig_jax.optim.train_state import TrainState
from ig_jax.parallel import collectives
from ig_jax.parallel.mesh import bytes_each, over_batch, replicated, to_global
from ig_jax.training import step as training_step
from ig_jax.training import trainer
from ig_jax.training.step import Noised
from ig_jax.types import Batch, Params

TERA, GIGA = 1e12, 1e9
FORWARD = "forward alone"  # the part that another holds


@dataclass
class Stepping:
    """A program that takes the state it is given over: each call goes on from the last one's."""

    program: Callable[..., tuple[TrainState, Any]]
    state: TrainState
    rest: tuple[Any, ...]

    def __call__(self) -> Any:
        self.state, metrics = self.program(self.state, *self.rest)
        return metrics


class Part(NamedTuple):
    """Something that a step does, as a program of its own."""

    seconds: Seconds
    reaches: str  # FLOP/s or bytes/s on each device


def examples(exp: Experiment) -> Batch:
    """As many batches [k, b, ...] as one dispatch takes, on the devices: all the first one."""
    t = exp.config.train
    indices = np.arange(t.batch_size) % len(exp.config.data.source)
    rows = exp.config.data.source.batch(indices)
    stacked = {name: np.stack([value] * t.steps_per_dispatch) for name, value in rows.items()}
    return to_global(stacked, exp.mesh, t.batch_size, axis=1)


def noised(exp: Experiment) -> Callable[[jax.Array, Batch, Params], Noised]:
    """Latents of a batch with their randomness, as `train.train_step` makes them."""

    def draw(step: jax.Array, batch: Batch, encoder: Params) -> Noised:
        c = exp.config
        x0 = c.data.codec.latent(batch["stored"], prng.key(c.seed, "codec", step), encoder)
        draws = exp.objective.draw(prng.key(c.seed, "train", step), x0)
        return Noised(x0, batch["label"], draws)

    return jax.jit(draw, out_shardings=over_batch(exp.mesh))


def gradients(exp: Experiment) -> Callable[[Params, Noised, Params], tuple[Params, Any]]:
    """Those of `train.train_step`."""
    parts = exp.config.train.accumulation
    of_rows = partial(training_step.gradients, objective=exp.split_objective, parts=parts)
    return collectives.over_devices(of_rows, exp.mesh, exp.axes)


def forward(exp: Experiment) -> Callable[[Params, Noised, Params], Any]:
    """The loss and what is logged: the backward pass is dead code where nobody asks for it."""
    both = gradients(exp)
    return lambda *args: both(*args)[1]


def optimizer_part(exp: Experiment, batch: Noised) -> Callable:
    """The update of a state from gradients that are there already."""

    def update(state: TrainState, grads: Params) -> tuple[TrainState, Any]:
        return training_step.update_state(
            state,
            batch,
            gradients=lambda *_: (grads, {}),
            optimizer=exp.optimizer,
            teacher_decay=exp.teacher_decay,
        )

    placed = jax.tree.map(lambda x: x.sharding, exp.abstract_state)
    return jax.jit(update, donate_argnums=0, out_shardings=(placed, None))


def breakdown(
    exp: Experiment, state: TrainState, batches: Batch, encoder: Params, time: Callable
) -> dict[str, Part]:
    """The parts of a step; `FORWARD` is a piece of the one behind it."""
    batch = {name: value[0] for name, value in batches.items()}
    draw, alone, both = noised(exp), trunk.jit(forward(exp)), trunk.jit(gradients(exp))
    ready = draw(state.step, batch, encoder)
    teacher = state.ema[ema.name(exp.teacher_decay)]
    step, params = state.step, state.trained
    drawing = time(lambda: draw(step, batch, encoder))
    forwards = time(lambda: alone(params, ready, teacher))
    gradients_too = time(lambda: both(params, ready, teacher))
    once = exp.config.train.batch_size * flops.forward(exp.net, exp.abstract_params) / exp.mesh.size
    grads = both(params, ready, teacher)[0]
    del params, teacher
    update = optimizer_part(exp, ready)
    updating = time(Stepping(update, state, (grads,)))
    # Each array of the state is read and written, each gradient read.
    moved = 2 * bytes_each(exp.abstract_state) + bytes_each(grads)
    return {
        "latents and noise": Part(drawing, ""),
        FORWARD: Part(forwards, f"{once / forwards.median / TERA:.3g} TFLOP/s"),
        "forward and backward": Part(
            gradients_too, f"{3 * once / gradients_too.median / TERA:.3g} TFLOP/s"
        ),
        "optimizer and averages": Part(updating, f"{moved / updating.median / GIGA:.3g} GB/s"),
    }


def measure(exp: Experiment, flags: argparse.Namespace) -> dict[str, Any]:
    """Runs steps; the record of them."""
    c = exp.config.train
    time = partial(measuring.seconds, calls=flags.calls, windows=flags.windows)
    batches = examples(exp)
    encoder = jax.device_put(exp.encoder_weights, replicated(exp.mesh))
    dispatch = training_step.make_dispatch(exp)
    program = measuring.built(dispatch, exp.abstract_state, batches, encoder)
    stepping = Stepping(program.program, training_step.init_state(exp), (batches, encoder))
    step = Seconds(*(value / c.steps_per_dispatch for value in time(stepping)))
    peak = measuring.peak_gib(exp.mesh.devices.ravel().tolist())
    state, stepping.state = stepping.state, None
    parts = breakdown(exp, state, batches, encoder, time)
    return {
        "batch": c.batch_size,
        "images_per_second": c.batch_size / step.median,
        "seconds_per_step": step._asdict(),
        "mfu": None,  # where the peak is not known
        **trainer.rates(exp).of(step.median),
        "memory_gib": {"peak": peak, "planned": measuring.planned_gib(program.program)},
        "trace_seconds": program.trace_seconds,
        "compile_seconds": program.compile_seconds,
        "parts": {name: {**p.seconds._asdict(), "reaches": p.reaches} for name, p in parts.items()},
    }


def summary(found: Mapping[str, Any]) -> list[list[str]]:
    head = ["images", "images/s", "s/step", "spread", "TFLOP/s a device", "MFU"]
    head += ["peak GiB", "planned GiB", "trace s", "compile s"]
    step, shown = Seconds(**found["seconds_per_step"]), measuring.shown
    row = [str(found["batch"]), f"{found['images_per_second']:.4g}", f"{step.median:.4g}"]
    row += [step.spread, shown(found["model_tflops_per_device"]), shown(found["mfu"], ".1%")]
    row += [shown(found["memory_gib"][kind]) for kind in ("peak", "planned")]
    return [head, [*row, f"{found['trace_seconds']:.1f}", f"{found['compile_seconds']:.1f}"]]


def parts_table(found: Mapping[str, Any]) -> list[list[str]]:
    whole = found["seconds_per_step"]["median"]
    rows = [["part", "seconds", "spread", "of the step", "reaches on each device"]]
    for name, part in found["parts"].items():
        took = Seconds(part["median"], part["least"], part["most"])
        share = f"{took.median / whole:.1%}"
        rows.append([name, f"{took.median:.4g}", took.spread, share, part["reaches"]])
    total = sum(p["median"] for name, p in found["parts"].items() if name != FORWARD)
    return [*rows, ["sum without forward", f"{total:.4g}", "", f"{total / whole:.1%}", ""]]


def abstract(exp: Experiment) -> tuple[TrainState, Batch]:
    """What `make_dispatch` takes, without its values."""
    source, t = exp.config.data.source, exp.config.train
    rows = (t.steps_per_dispatch, t.batch_size)
    stored = jax.ShapeDtypeStruct((*rows, *source.stored_shape), source.stored_dtype)
    return exp.abstract_state, {"stored": stored, "label": jax.ShapeDtypeStruct(rows, jnp.int32)}


def counted_flops(exp: Experiment) -> tuple[float, float]:
    """XLA's counts of the gradient of one image, and of one update without the gradient."""
    state, batches = abstract(exp)
    batch = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batches.items()}
    drawn = jax.eval_shape(noised(exp), state.step, batch, exp.encoder_weights)
    gradient = jax.jit(gradients(exp)).lower(state.trained, drawn, state.params)
    update = jax.jit(exp.optimizer.update).lower(state.trained, state.opt_state, state.trained)
    of_batch, of_update = (each.cost_analysis()["flops"] for each in (gradient, update))
    return of_batch / exp.config.train.batch_size, of_update


def compile_only(exp: Experiment, unrolled: Experiment) -> dict[str, Any]:
    """The record of a step that is compiled and not run."""
    built = measuring.built(training_step.make_dispatch(exp), *abstract(exp), exp.encoder_weights)
    memory = built.program.memory_analysis()
    counted, of_optimizer = counted_flops(unrolled)
    muon = exp.config.raw["optim"]["name"] == "muon"
    on_paper = newton_schulz_flops(exp.abstract_params, exp.config.optim.ns_steps) if muon else None
    return {
        "batch": exp.config.train.batch_size,
        "trace_seconds": built.trace_seconds,
        "compile_seconds": built.compile_seconds,
        "memory_gib": {
            "arguments": memory.argument_size_in_bytes / measuring.GIB,
            "temporaries": memory.temp_size_in_bytes / measuring.GIB,
        },
        "gradient_gflop_an_image": {
            "xla": counted / GIGA,
            "paper": exp.gradient_flops(1) / GIGA,
        },
        "optimizer_tflop": {"xla": of_optimizer / TERA, "paper": on_paper and on_paper / TERA},
    }


def compiled_table(found: Mapping[str, Any]) -> list[list[str]]:
    shown, rows = measuring.shown, [["of a step", "", "on paper"]]
    rows += [["trace s", shown(found["trace_seconds"]), ""]]
    rows += [["compile s", shown(found["compile_seconds"]), ""]]
    rows += [[f"{kind} GiB", shown(gib), ""] for kind, gib in found["memory_gib"].items()]
    for what in ("gradient_gflop_an_image", "optimizer_tflop"):
        xla, paper = found[what].values()
        rows.append([what.replace("_", " "), shown(xla, ".5g"), shown(paper, ".5g")])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    measuring.add_flags(parser)
    parser.add_argument("--compile_only", action="store_true", help="compute nothing")
    flags = parser.parse_args()
    asked = measuring.changes(flags)
    with measuring.mistakes_told():
        exp = measuring.load(flags.config, asked, flags.devices)
        record = {"what": "train", **measuring.circumstances(exp, flags)}
        if flags.compile_only:
            whole = {"model.unroll": exp.config.model.depth, "model.remat": "none"}
            unrolled = measuring.load(flags.config, asked | whole, devices=1)
            record |= compile_only(exp, unrolled)
            tables = [compiled_table(record)]
        else:
            record |= measure(exp, flags)
            tables = [summary(record), parts_table(record)]
    measuring.tell(record, *tables, json_file=flags.json)


if __name__ == "__main__":
    main()
