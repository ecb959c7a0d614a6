"""A training objective: a weighted sum of terms over one noised batch and one forward pass.

Time, noise and dropped labels are drawn here, once, from one key; every term sees the same. A term
is a frozen dataclass: its fields are its settings (`weight` among them), its call gives a loss for
each example, so that any term can be masked, reweighted by time, or logged by time. It may train a
head of its own, draw randomness of its own, and ask for the tokens behind any block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ig_jax import prng
from ig_jax.errors import require_all
from ig_jax.models import embed
from ig_jax.objectives.metrics import BY_TIME, Mean, mean_by_time, mean_of, once
from ig_jax.objectives.token_groups import GroupSettings, by_group, of_each_token
from ig_jax.optim.train_state import parted
from ig_jax.types import (
    NONE,
    Abstract,
    BatchRows,
    Gather,
    GroupTimes,
    Key,
    Labels,
    Latents,
    NetFn,
    NetOutput,
    OneDevice,
    Params,
    PerExample,
    PerToken,
    Process,
    Scalar,
    Times,
    Tokens,
    Whole,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """All randomness of one batch, before it is turned into times and dropped labels."""

    time: GroupTimes | Abstract  # standard draws, see `diffusion/training_times.py`
    noise: Latents | Abstract
    drop: Times | Abstract  # uniform; below the drop rate the label becomes the null class
    terms: Mapping[str, Any] = field(default_factory=dict)  # of `Term.draw`, by term
    groups: Any = ()  # of `GroupSettings.draw`


Ids = Int[Array, "b n"] | None


@dataclass(frozen=True)
class Teacher:
    """The averaged network. No gradient goes through it, and only what is called is computed.

    Attributes:
      predict: (x, t, y, ids) -> its outputs there, predictions in the scale of
        `NoisedBatch.target`.
      tokens: (x, t, y, ids, depths) -> {depth: its tokens [b, n, d] after that block}; blocks
        behind the last of `depths` are not computed.
      head: averages of the parts `Term.averaged` of the term's own head.

    `ids` are groups of tokens as in `NoisedBatch`; None: there is one time, and full attention.
    """

    predict: Callable[[Latents, GroupTimes, Labels, Ids], NetOutput]
    tokens: Callable[[Latents, GroupTimes, Labels, Ids, tuple[int, ...]], Mapping[int, Tokens]]
    head: Params = field(default_factory=dict)


@dataclass(frozen=True)
class NoisedBatch:
    """One noised batch and what the network made of it, as every term sees them."""

    x0: Latents
    noise: Latents
    t: GroupTimes
    x_t: Latents
    y: Labels  # already dropped
    target: Latents
    out: NetOutput  # predictions in the scale of `target`, and the tokens that terms need
    teacher: Teacher | None = None
    process: Process | None = None  # by which the latents were noised
    labels: Labels | None = None  # before some were dropped
    ids: Ids = None  # group of each token; None: there are no groups
    num_groups: int = 1
    step: Array | int = 0  # updates done before this one
    dtype: Any = jnp.float32  # of matrix products, the network's and those of heads
    mirrored: Latents | None = None  # latents of the mirror images, where a term reads them
    rows: BatchRows = OneDevice()  # reads the other rows of the batch, on other devices

    def squared_error(self, prediction: Latents) -> PerExample | PerToken:
        """Mean squared error against the target; of each token where tokens differ in time."""
        if self.t.ndim == 1:
            return squared_error(prediction, self.target)
        patch = embed.patch_side(self.target.shape[1], self.ids.shape[1])
        return jnp.mean(embed.patchify((prediction - self.target) ** 2, patch), axis=-1)


@dataclass(frozen=True)
class Needs:
    """What a term reads beside predictions; what several terms need is computed once."""

    taps: tuple[int, ...] = ()  # blocks (from 1) whose tokens are in `NoisedBatch.out.features`
    teacher_taps: tuple[int, ...] = ()  # blocks whose tokens it asks `NoisedBatch.teacher` for
    variance: bool = False  # `NetOutput.variance`, of a step of DDPM
    mirrored: bool = False  # `NoisedBatch.mirrored`
    whole_batch: bool = False  # other rows, by `NoisedBatch.rows`: none may come in another pass

    def check(self, depth: int) -> None:
        """Raises ValueError where a network of `depth` blocks has no such block."""
        for block in (*self.taps, *self.teacher_taps):
            if not 1 <= block <= depth:
                raise ValueError(
                    f"reads the tokens of block {block}, which must lie in 1..{depth} "
                    f"(model.depth = {depth})"
                )


@dataclass(frozen=True)
class Term(ABC):
    """A term of the loss, a class in `TERMS`; `__call__` is all that it must define.

    At step s the term counts `weight * weight_factor ** max(0, epoch - constant_epochs)` times,
    where epoch = s // (whole batches in the data set) counts from 0.
    """

    weight: float
    weight_factor: float = field(default=1.0, kw_only=True)  # 1: the weight is constant
    constant_epochs: int = field(default=0, kw_only=True)

    pooled: ClassVar[bool] = False  # the head sees a vector for each image, not for each token
    averaged: ClassVar[tuple[str, ...]] = ()  # parts of the head that the teacher has, averaged

    def __post_init__(self):
        rules = [
            ("weight", self.weight >= 0, "must not be negative"),
            ("weight_factor", 0 < self.weight_factor <= 1, "must lie in (0, 1]; 1 is constant"),
            ("constant_epochs", self.constant_epochs >= 0, "must not be negative"),
        ]
        require_all(self, rules)

    @property
    def needs(self) -> Needs:
        """What `__call__` reads beside predictions."""
        return Needs()

    def check(self, readouts: tuple[int, ...]) -> None:
        """Raises ValueError where the network lacks a readout that the term reads."""
        del readouts  # the final prediction is there without any

    def init(self, key: Key, net: NetFn) -> Params:
        """Fresh float32 parameters of the term's head, a nested dict; {} where it has none.

        Matrices [in, out] called `kernel` and vectors called `bias` or `scale` are split over
        devices and treated by optimizers as the network's are.
        """
        return {}

    def draw(self, key: Key, x0: Latents) -> Any:
        """The term's own randomness of a batch of latents: a pytree of arrays [b, ...]."""
        return ()

    def check_groups(self, groups: GroupSettings) -> None:
        """Raises ValueError where the term cannot be had with these groups of tokens."""
        del groups  # most terms see no more of them than the batch

    def check_rows(self, rows: int) -> None:
        """Raises ValueError where the term cannot be had of `rows` images on a device at a time."""
        del rows  # most terms see each image alone

    @abstractmethod
    def __call__(
        self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()
    ) -> PerExample | PerToken:
        """The loss of each example, or of each token where tokens have times of their own.

        Args:
          batch: one noised batch and what the network made of it.
          head: the trained parameters that began as `init` made them.
          draws: what `draw` drew for this batch.
        """

    def weight_at(self, epoch: Array | int) -> Scalar | float:
        """The term's weight in this epoch, from 0."""
        if self.weight_factor == 1:
            return self.weight
        falling = jnp.maximum(epoch - self.constant_epochs, 0)
        # As a power of a float32 factor it would lose a digit in a hundred epochs.
        return self.weight * jnp.exp(math.log(self.weight_factor) * falling)


@dataclass(frozen=True)
class Objective:
    """The sum of weight x mean loss over `terms`."""

    net: NetFn
    process: Process
    terms: Mapping[str, Term]
    label_drop: float  # share of labels replaced by the null class
    null_class: int
    gather: Gather = Whole()  # of the terms' heads, where devices share them
    dtype: Any = jnp.float32  # of matrix products
    steps_per_epoch: int = 1  # for weights that change by epochs
    groups: GroupSettings = GroupSettings()
    rows: BatchRows = OneDevice()

    @property
    def mirrors(self) -> bool:
        """Returns whether a term reads the latents of mirror images."""
        return any(term.needs.mirrored for term in self.terms.values())

    @property
    def teacher_passes(self) -> tuple[int, ...]:
        """The last block of each pass through the teacher, of terms that read its tokens."""
        return tuple(max(t.needs.teacher_taps) for t in self.terms.values() if t.needs.teacher_taps)

    def init(self, key: Key) -> dict[str, Params]:
        """Fresh heads by term; terms without one are left out."""
        heads = {n: t.init(prng.fold_name(key, n), self.net) for n, t in self.terms.items()}
        return {name: head for name, head in heads.items() if head}

    def averaged(self, heads: Mapping[str, Params]) -> dict[str, Params]:
        """The parts of heads that the teacher has too, by term."""
        parts = {name: self.terms[name].averaged for name in heads}
        return {name: {p: heads[name][p] for p in of} for name, of in parts.items() if of}

    def draw(self, key: Key, x0: Latents) -> Draws:
        """Fresh randomness for a batch of latents [b, h, w, c]."""
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        n, times = x0.shape[0], self.groups.times
        time = self.process.draw_time(time_key, n * times)
        tokens = self.net.settings.num_tokens(x0.shape[1]) if self.groups.count > 1 else 1
        return Draws(
            time=time.reshape(n, times) if times > 1 else time,
            noise=jax.random.normal(noise_key, x0.shape, jnp.float32),
            drop=jax.random.uniform(drop_key, (n,), jnp.float32),
            terms={name: t.draw(prng.fold_name(key, name), x0) for name, t in self.terms.items()},
            groups=self.groups.draw(prng.fold_name(key, "token groups"), n, tokens),
        )

    def predict(
        self,
        params: Params,
        x: Latents,
        t: GroupTimes,
        y: Labels,
        ids: Ids = None,
        *,
        taps: tuple[int, ...] = (),
    ) -> NetOutput:
        """The network's prediction in the scale of the process's `target`, and tokens at `taps`."""
        # A network that knows neither taps nor groups stays usable where none are needed.
        asked = {"taps": taps} if taps else {}
        out = self.net(params, x, self.process.condition_time(t), y, **asked, **self._asked(ids))

        def comparable(pred: Latents) -> Latents:
            return by_group(lambda t: self.process.comparable(pred, t), t, ids)

        heads = {depth: comparable(early) for depth, early in out.heads.items()}
        return out.replace(pred=comparable(out.pred), heads=heads)

    def forward(
        self,
        params: Params,
        x0: Latents,
        labels: Labels,
        draws: Draws,
        teacher: Params | None = None,
        step: Array | int = 0,
        mirrored: Latents | None = None,
    ) -> NoisedBatch:
        """The noised batch, and the network's outputs on it; for the arguments see `__call__`."""
        needs = [term.needs for term in self.terms.values()]
        taps = tuple(sorted({block for n in needs for block in n.taps}))
        t, ids = self.process.time(draws.time), self.groups.ids(draws.groups)
        y = jnp.where(draws.drop < self.label_drop, self.null_class, labels)
        x_t = by_group(lambda t: self.process.perturb(x0, draws.noise, t), t, ids)
        return NoisedBatch(
            x0=x0,
            noise=draws.noise,
            t=t,
            x_t=x_t,
            y=y,
            target=by_group(lambda t: self.process.target(x0, draws.noise, t), t, ids),
            out=self.predict(params, x_t, t, y, ids, taps=taps),
            process=self.process,
            labels=labels,
            ids=ids,
            num_groups=self.groups.count,
            teacher=None if teacher is None else self._teacher(teacher),
            step=step,
            dtype=self.dtype,
            mirrored=mirrored,
            rows=self.rows,
        )

    def _asked(self, ids: Ids) -> dict[str, Any]:
        """What a network is asked of groups of tokens: nothing where there are none."""
        return {} if ids is None else {"groups": self.groups.of_network(ids)}

    def _teacher(self, params: Params) -> Teacher:
        frozen = jax.lax.stop_gradient(params)

        def tokens(
            x: Latents, t: GroupTimes, y: Labels, ids: Ids, depths: tuple[int, ...]
        ) -> Mapping[int, Tokens]:
            t = self.process.condition_time(t)
            return self.net.tokens(frozen, x, t, y, depths, **self._asked(ids))

        return Teacher(partial(self.predict, frozen), tokens)

    def __call__(
        self,
        params: Params,
        x0: Latents,
        labels: Labels,
        draws: Draws,
        teacher: Params | None = None,
        step: Array | int = 0,
        frozen: Params = NONE,
        mirrored: Latents | None = None,
    ) -> tuple[Scalar, Mapping[str, Mean]]:
        """The loss to differentiate, and what to log.

        Args:
          params: what to differentiate for: of the network, beside heads of terms if there are any
            (`train_state.trained`).
          x0, labels: clean latents [b, h, w, c] and classes [b].
          draws: the randomness of this batch.
          teacher: averaged parameters, for terms that compare with the averaged network; beside
            them, averages of the heads' parts that it has (`averaged`).
          step: updates done before this one.
          frozen: the parts of the network that `params` lacks, where only some are trained.
          mirrored: latents of the mirror images, for terms that read them.

        Returns:
          The weighted sum; and metrics: 'loss', 'loss/<term>' (unweighted), and
          'loss_by_time/<term>' [TIME_BUCKETS] over the examples, or tokens where they have times of
          their own, in each bucket of times.
        """
        net, heads = parted(params)
        net = {**frozen, **net}
        teacher, averaged = (None, {}) if teacher is None else parted(teacher)
        p = self.forward(net, x0, labels, draws, teacher, step, mirrored)
        heads = self.gather.once(heads)
        averaged = self.gather.once(jax.lax.stop_gradient(averaged))

        def compute(name: str, term: Term) -> PerExample | PerToken:
            own = p
            if name in averaged:
                own = replace(p, teacher=replace(p.teacher, head=averaged[name]))
            return term(own, heads.get(name, {}), draws.terms.get(name, ()))

        each = {name: compute(name, term) for name, term in self.terms.items()}
        losses = {name: jnp.mean(loss) for name, loss in each.items()}
        epoch = step // self.steps_per_epoch
        total = sum(self.terms[name].weight_at(epoch) * loss for name, loss in losses.items())
        t = p.t if p.t.ndim == 1 else of_each_token(p.t, p.ids)
        metrics = {"loss": once(total)}
        metrics |= {f"loss/{name}": mean_of(loss) for name, loss in each.items()}
        return total, metrics | {f"{BY_TIME}{n}": mean_by_time(v, t) for n, v in each.items()}


def squared_error(prediction: Latents, target: Latents) -> PerExample:
    """Mean over height, width and channels of the squared error, float32 [b]."""
    return jnp.mean((prediction - target) ** 2, axis=(1, 2, 3))
