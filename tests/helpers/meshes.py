"""Trains, saves, restores and samples on meshes of eight virtual devices.

  python tests/helpers/meshes.py JOB FOLDER

writes into FOLDER what test_sharding.py compares: arrays of every case as CASE.npz, its compiled
step as CASE.hlo, figures as JOB.json. A process of its own, since a test session has two devices.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny

from configs import lightningdit_xl, sit_xl
from ig_jax import experiment as build
from ig_jax import pytree
from ig_jax.checkpoint import manager as checkpoint_manager
from ig_jax.config import run_config
from ig_jax.data import loader
from ig_jax.generation.batches import sample_batches
from ig_jax.optim.muon import newton_schulz_flops
from ig_jax.optim.train_state import TrainState
from ig_jax.parallel.mesh import AXES, bytes_each, replicate_locally, to_global
from ig_jax.programs import dry_run
from ig_jax.samplers import SAMPLERS
from ig_jax.training import step

Shape = tuple[int, int, int]  # devices along data, fsdp, tensor

STEPS = 4  # of a program
# Three blocks do not divide over eight devices.
COMMON = {
    "model.depth": 3,
    "model.num_heads": 8,
    "model.remat": "dots",
    "train.batch_size": 32,
    "train.ema_decays": (0.9,),
    "sample.batch_size": 40,
}
SIT = {"model.hidden_size": 64}
ALIGNED = SIT | {
    "objective.terms": {
        "flow": {"weight": 1.0},
        "self_alignment": {"weight": 0.5, "depth": 1, "teacher_depth": 2},
    },
    "objective.groups": {
        "shares": (0.25, 0.75),
        "dual_time": True,
        "separate_attention": True,
        "full_sample_prob": 0.2,
    },
}
SHAPES = [(8 // f // t, f, t) for t in (1, 2, 4, 8) for f in (1, 2, 4, 8) if f * t <= 8]
DOPRI5 = SAMPLERS["dopri5"](num_steps=500, rtol=1e-5, atol=1e-5)


def lightningdit() -> Mapping[str, Any]:
    """With Muon, and a term that reads the averages; MLPs of width 256."""
    c = tiny.get_config()
    lightningdit_xl.lightningdit(c)
    c.model.hidden_size = 96
    c.optim.learning_rate = 3e-3
    c.optim.ns_dtype = "float32"
    del c.objective.terms.flow
    c.objective.terms.accelerated_flow = {"weight": 1.0, "omega": 0.5, "bias": "ema"}
    return {name: c[name].to_dict() for name in ("model", "objective", "optim")}


def experiment(
    shape: Shape, family: Mapping[str, Any], changes: Mapping[str, Any] = {}
) -> build.Experiment:
    mesh = dict(zip(AXES, shape, strict=True))
    every = {**family, **COMMON, **changes, "mesh": mesh}
    return tiny.experiment(every, jax.devices()[: prod(shape)])


@dataclass(frozen=True)
class Programs:
    """The compiled programs of one experiment."""

    exp: build.Experiment

    @cached_property
    def state(self) -> TrainState:
        return self.exp.abstract_state

    @cached_property
    def begin(self) -> Any:
        placed = jax.tree.map(lambda x: x.sharding, self.state)
        return jax.jit(self.exp.fresh_state, out_shardings=placed).lower().compile()

    @cached_property
    def advance(self) -> Any:
        batches, _ = self.batches(0)
        return step.make_dispatch(self.exp).lower(self.state, batches, {}).compile()

    def batches(self, start: int) -> tuple[Any, Any]:
        """The next STEPS batches behind `start` examples, and where a run goes on after them."""
        c = self.exp.config
        data = loader.batches(c.data.source, c.train.batch_size, c.seed, start=start)
        rows = [next(data) for _ in range(STEPS)]
        stacked = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
        placed = to_global(stacked, self.exp.mesh, c.train.batch_size, axis=1)
        return placed, {"examples": start + STEPS * c.train.batch_size}

    def train(self, state: TrainState, start: int = 0) -> tuple[TrainState, Any]:
        state, metrics = self.advance(state, self.batches(start)[0], {})
        return state, {name: np.asarray(mean.value) for name, mean in metrics.items()}


def name_of(kind: str, shape: Shape) -> str:
    return f"{kind}_{'x'.join(map(str, shape))}"


def arrays(**trees: Any) -> dict[str, np.ndarray]:
    """Every leaf under the name of its tree and its own."""
    return {
        f"{name}{jax.tree_util.keystr(path)}": np.asarray(leaf)
        for name, values in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(values)
    }


def share_of_first(values: Any) -> float:
    """Bytes that the first device really holds, over those of the whole."""
    first = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(values) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == first) / pytree.num_bytes(values)


def run(
    folder: Path, kind: str, shape: Shape, changes: Mapping[str, Any]
) -> tuple[Programs, TrainState, dict[str, Any]]:
    """One program of STEPS steps from a fresh state; its files; figures of its memory."""
    programs = Programs(experiment(shape, changes))
    state = programs.begin()
    initial = arrays(initial=state.params)
    state, metrics = programs.train(state)
    found = {name: metrics[name] for name in ("loss", "grad_norm")}
    name = name_of(kind, shape)
    np.savez(folder / f"{name}.npz", **found, **initial, **arrays(params=state.params))
    (folder / f"{name}.hlo").write_text(programs.advance.as_text())
    memory = programs.begin.memory_analysis()
    parts = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema}
    figures = {
        "share": {part: share_of_first(values) for part, values in parts.items()},
        "bytes": pytree.num_bytes(state),
        "made": memory.output_size_in_bytes,
        "made_beside": memory.temp_size_in_bytes,
    }
    return programs, state, figures


def sampled(folder: Path, name: str, programs: Programs, state: TrainState) -> None:
    """Latents of ten samples under the weights of a state, by a fixed and an adaptive sampler."""
    exp = programs.exp
    generator = exp.pipeline.generator(decode=lambda x: x)
    weights = replicate_locally(exp.mesh, state.params)
    found = {}
    for kind, sampler in {"euler": exp.config.sample.sampler, "dopri5": DOPRI5}.items():
        drawn = sample_batches(generator, weights, 0, np.arange(10), sampler=sampler)
        found[kind] = np.concatenate([latents for _, latents, _ in drawn])
    np.savez(folder / f"samples_{name}.npz", **found)


def moved(folder: Path, programs: Mapping[Shape, Programs], state: TrainState) -> dict[str, Any]:
    """A state of one mesh saved, restored on others, and trained on."""
    shape = (1, 8, 1)
    source = programs[shape]
    _, position = source.batches(0)
    checkpoints = checkpoint_manager.Checkpoints(folder)
    checkpoints.save(state, position, source.exp.config.raw)
    checkpoints.wait()
    start = checkpoints.meta(STEPS)["data"]["examples"]
    others = {(2, 4, 1): None, (1, 2, 1): None} | programs
    losses, whole = {}, arrays(saved=state)
    for to in others:
        like = experiment(to, SIT).abstract_state
        restored = checkpoints.restore(STEPS, like)
        assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
            lambda x: x.sharding, like
        )
        whole |= arrays(**{name_of("on", to): restored})
        if to in programs:
            losses[name_of("on", to)] = programs[to].train(restored, start)[1]["loss"].tolist()
    np.savez(folder / "moved.npz", **whole)
    checkpoints.close()
    unbroken = source.train(state, start)[1]["loss"].tolist()
    return {"start": start, "unbroken": unbroken, "losses": losses}


def abstractly(module: Any, shape: Shape) -> dict[str, int]:
    """Bytes of a published run's state, in all and on each device, without making it."""
    c = module.get_config()
    c.mesh.update(dict(zip(AXES, shape, strict=True)))
    exp = build.experiment(run_config.parse(c, devices=8))
    state = exp.abstract_state
    return {"whole": pytree.num_bytes(state), "each": bytes_each(state)}


def sit(folder: Path) -> dict[str, Any]:
    runs = {}
    for shape in ((1, 1, 1), (8, 1, 1), (1, 8, 1)):
        runs[shape] = run(folder, "sit", shape, SIT)
    for shape in ((1, 1, 1), (1, 8, 1)):
        sampled(folder, name_of("sit", shape), *runs[shape][:2])
    programs = {shape: ran[0] for shape, ran in runs.items()}
    return {
        "figures": {name_of("sit", shape): ran[2] for shape, ran in runs.items()},
        "moved": moved(folder, programs, runs[1, 8, 1][1]),
        "described": dry_run.describe(
            tiny.experiment(
                {"model.hidden_size": 20, "model.num_heads": 5, "sample.batch_size": 40}
            )
        ),
    }


def aligned(folder: Path) -> dict[str, Any]:
    """SiT with a teacher, a head and groups of tokens."""
    for shape in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)):
        run(folder, "aligned", shape, ALIGNED)
    return {}


def light(folder: Path) -> dict[str, Any]:
    """Those of LightningDiT, one of SiT to even out the two jobs, and what needs no training."""
    run(folder, "light", (1, 1, 1), lightningdit())
    run(folder, "light", (2, 2, 2), lightningdit())
    run(folder, "parts", (2, 2, 2), SIT | {"train.accumulation": 2})
    return {
        "muon": shared_out(folder),
        "published": {
            f"{module.__name__} {name_of('', shape)}": abstractly(module, shape)
            for module in (sit_xl, lightningdit_xl)
            for shape in ((1, 8, 1), (8, 1, 1))
        },
    }


def shared_out(folder: Path) -> dict[str, float]:
    """The optimizer's update alone, of eight blocks on eight devices."""
    exp = experiment((1, 8, 1), lightningdit(), {"model.depth": 8})
    state = exp.abstract_state
    update = jax.jit(exp.optimizer.update)
    compiled = update.lower(state.params, state.opt_state, state.params).compile()
    (folder / "muon.hlo").write_text(compiled.as_text())
    every = newton_schulz_flops(exp.abstract_params, exp.config.optim.ns_steps)
    alone = newton_schulz_flops(
        {n: leaf for n, leaf in exp.abstract_params.items() if n != "blocks"},
        exp.config.optim.ns_steps,
    )
    counted = compiled.cost_analysis()["flops"]
    return {"each": counted, "stacks": every - alone, "others": alone}


def broad(folder: Path) -> dict[str, Any]:
    """All other shapes and types."""
    for shape in [(2, 1, 1), (1, 2, 1), (4, 1, 1), *SHAPES]:
        run(folder, "sit", shape, SIT)
    for shape in [(1, 1, 1), *SHAPES]:
        run(folder, "light", shape, lightningdit())
    for shape in ((1, 1, 1), (1, 8, 1)):
        run(folder, "bfloat16", shape, SIT | {"model.dtype": "bfloat16"})
    jax.config.update("jax_disable_most_optimizations", False)
    for shape in ((8, 1, 1), (1, 8, 1)):
        run(folder, "optimised", shape, SIT)
    return {}


if __name__ == "__main__":
    job, folder = sys.argv[1], Path(sys.argv[2])
    jobs = {"sit": sit, "light": light, "broad": broad, "aligned": aligned}
    found = jobs[job](folder)
    (folder / f"{job}.json").write_text(json.dumps(found))
