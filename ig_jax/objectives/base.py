"""A training objective: a weighted sum of terms over one noised batch and one forward pass.

Time, noise and dropped labels are drawn here, once, from one key; every term sees the same. A term
is a frozen dataclass: its fields are its settings (`weight` among them), its call gives a loss for
each example, so that any term can be masked, reweighted by time, or logged by time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ig_jax.objectives.metrics import BY_TIME, sum_by_time
from ig_jax.types import (
    Abstract,
    Key,
    Labels,
    Latents,
    NetFn,
    NetOutput,
    Params,
    PerExample,
    Process,
    Scalar,
    Times,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """All randomness of one batch, before it is turned into times and dropped labels."""

    time: Times | Abstract  # standard draws, see `diffusion/times.py`
    noise: Latents | Abstract
    drop: Times | Abstract  # uniform; below the drop rate the label becomes the null class


# (x, t, y) -> what a network predicts there, in the scale of `Pass.target`
Predict = Callable[[Latents, Times, Labels], NetOutput]


@dataclass(frozen=True)
class NoisedBatch:
    """One noised batch and what the network made of it, as every term sees them."""

    x0: Latents
    noise: Latents
    t: Times
    x_t: Latents
    y: Labels  # already dropped
    target: Latents
    out: NetOutput  # predictions in the scale of `target`
    teacher: Predict | None = None  # the averaged network; no gradient goes through it


@runtime_checkable
class Term(Protocol):
    """What `TERMS` holds."""

    weight: float

    def check(self, readouts: tuple[int, ...]) -> None:
        """Raises ValueError where the network lacks what the term reads."""
        ...

    def __call__(self, p: NoisedBatch) -> PerExample: ...


@dataclass(frozen=True)
class Objective:
    """The sum of weight x mean loss over `terms`."""

    net: NetFn
    process: Process
    terms: Mapping[str, Term]
    label_drop: float  # share of labels replaced by the null class
    null_class: int

    def draw(self, key: Key, x0: Latents) -> Draws:
        """Fresh randomness for a batch of latents [b, h, w, c]."""
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        n = x0.shape[0]
        return Draws(
            time=self.process.draw_time(time_key, n),
            noise=jax.random.normal(noise_key, x0.shape, jnp.float32),
            drop=jax.random.uniform(drop_key, (n,), jnp.float32),
        )

    def predict(self, params: Params, x: Latents, t: Times, y: Labels) -> NetOutput:
        """What the network predicts, in the scale of the process's `target`."""
        out = self.net(params, x, self.process.condition_time(t), y)
        heads = {depth: self.process.comparable(early, t) for depth, early in out.heads.items()}
        return out.replace(pred=self.process.comparable(out.pred, t), heads=heads)

    def forward(
        self,
        params: Params,
        x0: Latents,
        labels: Labels,
        draws: Draws,
        teacher: Params | None = None,
    ) -> NoisedBatch:
        t = self.process.time(draws.time)
        y = jnp.where(draws.drop < self.label_drop, self.null_class, labels)
        x_t = self.process.perturb(x0, draws.noise, t)
        frozen = jax.lax.stop_gradient(teacher)
        return NoisedBatch(
            x0=x0,
            noise=draws.noise,
            t=t,
            x_t=x_t,
            y=y,
            target=self.process.target(x0, draws.noise, t),
            out=self.predict(params, x_t, t, y),
            teacher=None if teacher is None else partial(self.predict, frozen),
        )

    def __call__(
        self,
        params: Params,
        x0: Latents,
        labels: Labels,
        draws: Draws,
        teacher: Params | None = None,
    ) -> tuple[Scalar, Mapping[str, Array]]:
        """The loss to differentiate, and what to log.

        Args:
          params: what to differentiate for.
          x0, labels: clean latents [b, h, w, c] and classes [b].
          draws: the randomness of this batch.
          teacher: averaged parameters, for terms that compare with the averaged network.

        Returns:
          The weighted sum; and metrics: scalars 'loss' and 'loss/<term>' (unweighted), and sums
          'by_time/<term>' [TIME_BUCKETS] over the examples in each bucket of times, whose numbers
          are 'by_time/examples'.
        """
        p = self.forward(params, x0, labels, draws, teacher)
        each = {name: term(p) for name, term in self.terms.items()}
        losses = {name: jnp.mean(loss) for name, loss in each.items()}
        total = sum(self.terms[name].weight * loss for name, loss in losses.items())
        metrics = {"loss": total} | {f"loss/{name}": loss for name, loss in losses.items()}
        by_time = {"examples": jnp.ones_like(p.t), **each}
        return total, metrics | {f"{BY_TIME}{n}": sum_by_time(v, p.t) for n, v in by_time.items()}


def require_weight(weight: float) -> None:
    """Raises ValueError for a weight that would train away from the target."""
    if weight < 0:
        raise ValueError(f"weight = {weight}: must not be negative")


def squared_error(prediction: Latents, target: Latents) -> PerExample:
    """Mean over height, width and channels of the squared error, float32 [b]."""
    return jnp.mean((prediction - target) ** 2, axis=(1, 2, 3))
