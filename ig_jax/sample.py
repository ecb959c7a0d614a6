"""Sampling: noise to pictures in one compiled call a batch; files that can be finished later.

Sample i depends on (seed, i) alone: on no batch size, number of devices, or order (but for
rounding, which an adaptive sampler may amplify up to its tolerances). Files that exist
are not made again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool

from ig_jax import checkpoint, compatible, flops, guidance, guide, logs, prng, sharding
from ig_jax.build import Experiment
from ig_jax.config import Config
from ig_jax.errors import UserError
from ig_jax.guidance import KINDS, Guidances, Guided, Stretch, Worse
from ig_jax.sample_files import SampleFiles
from ig_jax.samplers import base
from ig_jax.samplers.base import Sampler
from ig_jax.types import Labels, Latents, Params, Scalar

T = TypeVar("T")


class Plan(NamedTuple):
    """What decides which program draws samples; the scales of guidance do not."""

    sampler: Sampler
    grid: tuple[float, ...]  # times, from noise to data
    cut: tuple[Stretch, ...]
    channels: tuple[tuple[str, int], ...]  # kind of guidance -> its channels


def plan(config: Config, sampler: Sampler, guidances: Guidances) -> Plan:
    """The times that `sampler` visits under `config`, and what guides it when."""
    low, high = config.process.interval(sampling=True)
    channels = tuple((kind, g.channels) for kind, g in guidances.items())
    if sampler.adaptive:
        grid, cut = guidance.pieces(high, low, guidances)
    else:
        grid = low + (high - low) * base.shift_times(sampler.grid(), config.sample.time_shift)
        cut = guidance.stretches(grid, guidances, at_end=sampler.guided_at_end)
    return Plan(sampler, tuple(grid.tolist()), cut, channels)


def trajectory(
    guided: Guided, plan: Plan, shape: tuple[int, ...], seed: jax.Array, indices: jax.Array
) -> Latents:
    """Latents [b, *shape] of samples `indices` [b] under seed."""
    keys = prng.sample_keys(seed, indices)
    return base.sample(
        plan.sampler,
        np.array(plan.grid),
        guided.fields(plan.cut),
        prng.sample_normal(keys, shape, prng.LATENTS),
        lambda i: prng.sample_normal(keys, shape, prng.FIRST_STEP + i),
    )


def one_by_one(draw: Callable[[jax.Array, Labels], Latents]) -> Callable:
    """`draw(indices [b], labels [b])` so that every sample is a batch of its own."""

    def each(indices: jax.Array, y: Labels) -> Latents:
        return jax.vmap(lambda i, label: draw(i[None], label[None])[0])(indices, y)

    return each


class Generator:
    """Draws samples of one experiment; compiles a program for every plan it meets."""

    def __init__(
        self,
        exp: Experiment,
        worse: Worse | None = None,
        decode: Callable[[Latents], jax.Array] | None = None,
    ):
        """
        Args:
          exp: network, process, sampler, guidances.
          worse: what autoguidance extrapolates from; None where it is off.
          decode: from latents to what is returned; by default the codec's pictures.
        """
        self.exp, self.worse = exp, worse
        codec = exp.config.data.codec
        self._decode = codec.decode if decode is None else lambda x, weights: decode(x)
        whole, rows = sharding.replicated(exp.own_mesh), sharding.over_batch(exp.own_mesh)
        weights = codec.decoder_weights() if decode is None else {}
        self._codec_weights = jax.device_put(weights, whole)
        self._program = jax.jit(
            self._generate,
            static_argnums=0,
            in_shardings=(whole, whole, whole, whole, whole, rows, rows),
            out_shardings=(rows, rows),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what is returned."""
        latents = jax.ShapeDtypeStruct((1, *self.exp.net.latent_shape), jnp.float32)
        return jax.eval_shape(self._decode, latents, self._codec_weights).shape[1:]

    def _generate(self, plan: Plan, *given: Any) -> tuple[jax.Array, Bool[Array, "b"]]:
        """Every device draws its own rows, and none waits for another."""
        whole, rows = PartitionSpec(), PartitionSpec(sharding.BATCH)
        each = jax.shard_map(
            partial(self._rows, plan),
            mesh=self.exp.own_mesh,
            in_specs=(*[whole] * (len(given) - 2), rows, rows),
            out_specs=rows,
            check_vma=False,
        )
        return each(*given)

    def _rows(
        self,
        plan: Plan,
        params: Params,
        worse: Params | None,
        codec: Params,
        scales: Mapping[str, Scalar],
        seed: jax.Array,
        indices: jax.Array,
        y: Labels,
    ) -> tuple[jax.Array, Bool[Array, "b"]]:
        def draw(indices: jax.Array, y: Labels) -> Latents:
            guided = Guided(
                net=self.exp.net,
                params=params,
                process=self.exp.config.process,
                y=y,
                null_class=self.exp.num_classes,
                scales=scales,
                channels=dict(plan.channels),
                readout=self.exp.config.readout,
                worse=self.worse and replace(self.worse, params=worse),
            )
            return trajectory(guided, plan, self.exp.net.latent_shape, seed, indices)

        latents = (one_by_one(draw) if plan.sampler.adaptive else draw)(indices, y)
        return self._decode(latents, codec), jnp.all(jnp.isfinite(latents), axis=(1, 2, 3))

    def __call__(
        self,
        params: Params,
        seed: jax.Array | np.ndarray | np.uint32,
        indices: jax.Array,
        y: Labels,
        guidances: Guidances | None = None,
        sampler: Sampler | None = None,
    ) -> tuple[jax.Array, Bool[Array, "b"]]:
        """Samples `indices` [b] with labels y [b]: decoded [b, ...], and which have finite latents.

        Args:
          params: of the network.
          seed: uint32; sample i depends on it and on i alone.
          indices, y: which samples, and their labels.
          guidances, sampler: others than the config's.
        """
        s = self.exp.config.sample
        guidances = s.guidances if guidances is None else guidances
        scales = {kind: np.float32(g.scale) for kind, g in guidances.items()}
        chosen = plan(self.exp.config, sampler or s.sampler, guidances)
        other = self.worse and self.worse.params
        return self._program(chosen, params, other, self._codec_weights, scales, seed, indices, y)


def labels_of(config: Config, seed: int, indices: np.ndarray) -> np.ndarray:
    """Labels int32 [b] of samples `indices`, as `sample.labels` asks.

    Random: each sample's own draw. Balanced: every run of num_classes samples holds each class
    once, in shuffled order (metrics over consecutive splits need the shuffle). Given: repeated in
    order.
    """
    classes = config.data.source.num_classes
    given = config.sample.given_labels
    if given is not None:
        return np.array(given, np.int32)[indices % len(given)]
    if config.sample.labels == "random":
        keys = prng.sample_keys(seed, jnp.asarray(indices))
        return np.asarray(prng.sample_labels(keys, classes), np.int32)
    rounds = {r: np.random.default_rng((seed, r)).permutation(classes) for r in indices // classes}
    return np.array([rounds[i // classes][i % classes] for i in indices], np.int32)


class Drawn(NamedTuple):
    """A batch of samples on the host."""

    indices: np.ndarray
    images: np.ndarray  # decoded
    labels: np.ndarray


def batches(
    generator: Generator, params: Params, seed: int, indices: np.ndarray, **chosen: Any
) -> Iterator[Drawn]:
    """Samples `indices`, a batch at a time; the last one is padded, then cut.

    The next batch is begun before one is handed out: while the host writes files, devices work.
    `chosen` may name guidances and a sampler, as for `Generator`.

    Raises:
      UserError: a sample is not finite.
    """
    exp = generator.exp
    size = exp.config.sample.batch_size * exp.own_mesh.size // exp.mesh.size
    labels = labels_of(exp.config, seed, indices)

    def begun() -> Iterator[tuple[np.ndarray, tuple[jax.Array, jax.Array]]]:
        for start in range(0, len(indices), size):
            taken = np.arange(start, min(start + size, len(indices)))
            padded = np.resize(taken, size)
            host = {"i": indices[padded].astype(np.int32), "y": labels[padded]}
            rows = sharding.to_global(host, exp.own_mesh, size)
            yield taken, generator(params, np.uint32(seed), rows["i"], rows["y"], **chosen)

    for taken, drawn in _one_ahead(begun()):
        images, finite = (sharding.to_host(x)[: len(taken)] for x in drawn)
        sampler = chosen.get("sampler") or exp.config.sample.sampler
        _require_finite(indices[taken][~finite], sampler)
        yield Drawn(indices[taken], images, labels[taken])


def _one_ahead(begun: Iterator[T]) -> Iterator[T]:
    """Every item once the next one is begun."""
    for item, _ in pairwise(chain(begun, [None])):
        yield item


def _require_finite(failed: np.ndarray, sampler: Sampler) -> None:
    """Raises UserError if there are any indices [n] of samples that are not numbers."""
    if not len(failed):
        return
    mend = "lower the guidance scales, or look whether training went well"
    if sampler.adaptive:
        mend = (
            f"{type(sampler).__name__} may need more than sample.sampler.num_steps = "
            f"{sampler.num_steps} steps at rtol = {sampler.rtol:g}; raise either"
        )
    raise UserError(f"sample {failed[0]} and {len(failed) - 1} others are not finite: {mend}")


def load_weights(exp: Experiment, workdir: Path) -> tuple[int, Params]:
    """(step, weights) of the newest checkpoint, as `sample.weights` asks.

    Raises:
      UserError: there is no checkpoint, or it was made with another model.
    """
    checkpoints = checkpoint.of_run(workdir, "--workdir")

    def read(step: int) -> Params:
        checkpoints.require(step, exp.config.raw, compatible.SAMPLES)
        return checkpoints.weights(step, exp.config.sample.weights, exp.weights_here)

    try:
        step, found = checkpoints.newest(read, checkpoint.WEIGHTS)
        return step, sharding.whole_on(exp.mesh, found)
    finally:
        checkpoints.close()


def cost(generator: Generator, **chosen: Any) -> dict[str, int] | None:
    """What one image takes: evaluations of the networks and their FLOPs, without the decoder.

    `chosen` may name guidances and a sampler, as for `Generator`. None: an adaptive sampler, which
    decides for each image.
    """
    exp, other = generator.exp, generator.worse
    sampler = chosen.get("sampler") or exp.config.sample.sampler
    guidances = chosen.get("guidances") or exp.config.sample.guidances
    if sampler.adaptive:
        return None
    cut, calls = plan(exp.config, sampler, guidances).cut, sampler.calls()
    count = guidance.evaluations(cut, calls)
    # Where Internal Guidance is off the early heads are never computed.
    guided = guidance.evaluations(cut, calls, kind="ig").network
    head = () if exp.config.readout is None else (exp.config.readout,)
    with_head = flops.forward(exp.net, exp.abstract_params, heads=head)
    without = flops.forward(exp.net, exp.abstract_params, heads=())
    total = guided * with_head + (count.network - guided) * without
    if count.other:
        total += count.other * flops.forward(other.net, other.params, heads=())
    return {"evaluations": count.network, "of_the_guide": count.other, "flops": total}


def settings(exp: Experiment, step: int) -> dict[str, Any]:
    """All that decides what sample i looks like, for the record and for the folder's name."""
    s = exp.config.raw["sample"]
    decisive = ("seed", "labels", "weights", "sampler", "time_shift", "readout", *KINDS)
    model = {name: exp.config.raw[name] for name in ("model", "process")}
    rest = {"guide": guide.record(exp), "codec": exp.config.raw["data"]["codec"]}
    return {"checkpoint_step": step, **{name: s[name] for name in decisive}, **rest, **model}


def folder(parent: Path, record: Mapping[str, Any]) -> Path:
    """A folder in `parent` whose name tells the main settings, and differs whenever any differs."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    if "sampler" not in record:  # samples of other programs
        return parent / f"files-{digest}"
    sampler = record["sampler"]
    name = (
        f"step{record['checkpoint_step']}-{record['weights']}-{sampler['name']}"
        f"{sampler['num_steps']}-ig{record['ig']['scale']:g}-cfg{record['cfg']['scale']:g}"
    )
    seed = f"-seed{record['seed']}" if "seed" in record else ""
    return parent / f"{name}{seed}-{digest}"


def run(exp: Experiment, workdir: Path) -> Path:
    """Draws `sample.num` pictures from the newest checkpoint of `workdir`; returns their folder.

    Raises:
      UserError: there is no checkpoint; a sample is not finite; the disk is full.
    """
    step, params = load_weights(exp, workdir)
    s = exp.config.sample
    record = settings(exp, step)
    generator = Generator(exp, guide.load(exp))
    target = folder(workdir / "samples", record)
    files = SampleFiles(target, s.num, generator.shape, s.files)
    of_image = cost(generator)
    if jax.process_index() == 0:
        files.create()
        logs.write_json(target / "settings.json", record | {"an_image": of_image})
    sharding.meet("begun")
    mine = np.array(sharding.mine(s.num))
    missing = files.missing(mine)
    # The bar is of this process, whose share takes as long as everybody's.
    done = len(mine) - len(missing)
    with logs.progress(len(mine), initial=done, unit="image", what="sampling") as bar:
        for indices, images, _ in batches(generator, params, s.seed, missing):
            files.write(indices, images)
            bar.update(len(indices))
    sharding.meet("sampled")
    if jax.process_index() == 0:
        made = files.finish(labels_of(exp.config, s.seed, np.arange(s.num)))
        logs.say(f"{s.num:,} samples of step {step} are in {target} ({', '.join(made)})")
        if of_image is not None:
            logs.say(
                f"each took {of_image['evaluations']} evaluations of the network, "
                f"{of_image['flops'] / 1e12:,.3g} TFLOP"
            )
    return target
